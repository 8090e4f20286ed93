"""Ten classes: a small CNN reads scikit-learn's 8x8 digits; the LLM is asked which digit is in the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model_fusion.evaluate.tasks.base import Metric, Task
from model_fusion.evaluate.tasks.exchanged import permuted
from model_fusion.fuse.experts import ClassDecision, Expert, Field, InputSchema
from model_fusion.fuse.fit import Example

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCHEMA = InputSchema((Field("picture", "array", shape=(8, 8)),))
PROMPT = "Which digit is in the picture? <|picture|>"
PARAPHRASES = (
    "<|picture|> What digit do you see?",
    "Look at this: <|picture|> Which digit is it?",
    "The picture: <|picture|>. Name the digit.",
    "Please read the handwritten digit. <|picture|>",
    "What number was written here? <|picture|>",
    "Tell me the digit in this picture: <|picture|>",
    "Which number from zero to nine is this? <|picture|>",
    "Somebody wrote a digit: <|picture|> Which one?",
    "Name the digit shown: <|picture|>",
    "Digit? <|picture|>",
)
SPLIT_SEED = 20261121


class DigitNet(nn.Module):
    """A small CNN: pictures float32 [B, 8, 8] with values 0 to 16 -> logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, pictures: Tensor) -> Tensor:
        out: Tensor = self.net(pictures[:, None] / 16)
        return out


def train_net(pictures: Tensor, labels: Tensor, *, seed: int, epochs: int = 12) -> DigitNet:
    """Adam on cross-entropy; about two seconds on one core."""
    torch.manual_seed(seed)
    net = DigitNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(pictures)), 32):
            loss = nn.functional.cross_entropy(net(pictures[rows]), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return net.eval()


def parse(text: str) -> str | None:
    """The digit's name if exactly one is in the answer, as a word or a numeral; else None."""
    words = re.findall(r"[a-z]+|\d+", text.lower())
    found = {w for w in words if w in NAMES} | {NAMES[int(w)] for w in words if w.isdigit() and int(w) < 10}
    return found.pop() if len(found) == 1 else None


def decisions(expert: Expert, items: Sequence[Any]) -> list[str]:
    """The expert's digit name for each picture."""
    decision = expert.decide(items)
    assert isinstance(decision, ClassDecision)
    return [decision.classes[i] for i in decision.log_probs.argmax(dim=1).tolist()]


def true_names(items: Sequence[Any]) -> list[str]:
    """The name of the digit that each picture shows."""
    from sklearn.datasets import load_digits

    data = load_digits()
    known = {
        picture.astype(np.float32).tobytes(): NAMES[n] for picture, n in zip(data.images, data.target, strict=True)
    }
    return [known[np.asarray(item, dtype=np.float32).tobytes()] for item in items]


def untrained_expert(seed: int = 0) -> Expert:
    """The same CNN, never trained (control 5)."""
    torch.manual_seed(seed)
    return Expert.from_torch(DigitNet().eval(), SCHEMA, classes=NAMES)


def digits_task(expert: Expert | None = None, *, seed: int = 0, labels: int = 400) -> Task:
    """The CNN learns from 1,000 labelled pictures; the bridge from `labels` of them with the CNN's own decisions;
    the test is 300 pictures that neither has seen, scored against the truth and against the expert."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures, truth = data.images.astype(np.float32), data.target
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pictures))
    taught, unseen, test = order[:1000], order[1000:1400], order[1400:1700]
    if expert is None:
        net = train_net(torch.tensor(pictures[taught]), torch.tensor(truth[taught]), seed=seed)
        expert = Expert.from_torch(net, SCHEMA, classes=NAMES)
    chosen = expert
    # Pictures that the CNN was not trained on: there its probabilities are as unsure as they will be in use.
    shown = unseen[: min(labels, len(unseen))]
    names = dict(zip(shown.tolist(), decisions(chosen, [pictures[i] for i in shown]), strict=True))
    held = max(1, len(shown) // 5)

    def examples(rows: Any) -> tuple[Example, ...]:
        return tuple(Example(PROMPT, {"picture": pictures[i]}, names[int(i)]) for i in rows)

    answer = {pictures[i].tobytes(): NAMES[truth[i]] for i in order}

    def score(items: Sequence[Any], texts: Sequence[str]) -> dict[str, float]:
        read = [parse(text) for text in texts]
        wanted = decisions(chosen, items)
        right = [answer[np.asarray(item, dtype=np.float32).tobytes()] for item in items]
        accuracy = sum(a == b for a, b in zip(read, right, strict=True)) / len(items)
        own = sum(a == b for a, b in zip(wanted, right, strict=True)) / len(items)
        agreement = sum(a == b for a, b in zip(read, wanted, strict=True)) / len(items)
        # An expert put in by an audit may be right nowhere: one picture then stands for none.
        ratio = accuracy / max(own, 1 / len(items))
        return {"agreement": agreement, "accuracy": accuracy, "expert_accuracy": own, "ratio": ratio}

    return Task(
        name="digits",
        expert_name="picture",
        expert=chosen,
        prompt=PROMPT,
        paraphrases=PARAPHRASES,
        train=examples(shown[held:]),
        validation=examples(shown[:held]),
        test=tuple(
            Example(PROMPT, {"picture": pictures[i]}, name)
            for i, name in zip(test, decisions(chosen, [pictures[i] for i in test]), strict=True)
        ),
        all_inputs=tuple(pictures[i] for i in test),
        parse=parse,
        score=score,
        in_words=lambda item: "rows of ink from 0 to 16: " + "; ".join(" ".join(f"{v:.0f}" for v in r) for r in item),
        metric=Metric("accuracy", "accuracy against the truth"),
        retold=lambda other: digits_task(other, seed=seed, labels=labels),
        untrained=untrained_expert,
        exchanged={
            "its outputs shifted by one": lambda: permuted(chosen, [*range(1, 10), 0]),
            "its outputs reversed": lambda: permuted(chosen, range(9, -1, -1)),
            "its outputs permuted": lambda: permuted(chosen, (3, 7, 0, 9, 1, 8, 2, 4, 6, 5)),
        },
        options={"seed": seed, "labels": labels},
    )
