"""Blackjack as a fusion task: experts that learned from played hands, prompts that say nothing of the state."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model_fusion.errors import InputError
from model_fusion.evaluate.blackjack import State, evaluate, optimal_policy, states
from model_fusion.evaluate.hands import index, play
from model_fusion.evaluate.tasks.base import Metric, Task
from model_fusion.evaluate.tasks.exchanged import permuted, rule
from model_fusion.fuse.experts import ClassDecision, Expert, Field, InputSchema
from model_fusion.fuse.fit import Example

CLASSES = ("stick", "hit")
SCHEMA = InputSchema((Field("sum", "int", 4, 21), Field("dealer", "int", 1, 10), Field("usable_ace", "bool")))
PROMPT = "Should I hit or stick? The table: <|table|>"
PARAPHRASES = (
    "<|table|> What should I do, hit or stick?",
    "I am playing blackjack. This is my table: <|table|> Hit or stick?",
    "Look at the table: <|table|> Do I take another card (hit) or not (stick)?",
    "The table is <|table|>. Hit or stick?",
    "Blackjack table: <|table|>\nYour advice, hit or stick?",
    "Given this table, <|table|>, is it better to hit or to stick?",
    "Tell me whether to hit or stick here: <|table|>",
    "My hand and the dealer's card: <|table|> Stick or hit?",
    "Please advise me. Table: <|table|>. Should the player hit or stick?",
    "Hit or stick? <|table|>",
)
SPLIT_SEED = 20261121
TEST_STATES = 80
TEMPERATURE = 0.05
"""Action values become log-probabilities through a softmax at this temperature: decisive, yet graded near a tie."""


class GridNet(nn.Module):
    """A small CNN from a picture of the state, float32 [B, 2, 22, 11] (one plane for each kind of hand, one bright
    pixel at sum and dealer's card), to the values of sticking and hitting [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(8 * 22 * 11, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, grid: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(grid))
        return out


def grid(items: Sequence[State]) -> Tensor:
    """States as pictures, float32 [B, 2, 22, 11]."""
    picture = torch.zeros(len(items), 2, 22, 11)
    for row, (total, dealer, usable) in enumerate(items):
        picture[row, int(usable), total, dealer] = 1.0
    return picture


class Decisive(nn.Module):
    """Action values as logits: value / TEMPERATURE."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) / TEMPERATURE
        return out


def train_net(net: nn.Module, pictures: Tensor, *, seed: int, hands: int = 1_000_000, sweeps: int = 5) -> nn.Module:
    """Fitted Q iteration on played hands: each sweep fits the net to the mean of r + max Q(next) of every state
    and action that was played, weighted by how precisely the hands tell it. pictures: the net's input for each of
    `states()`, in order."""
    torch.manual_seed(seed)
    played = play(hands, np.random.default_rng(seed))
    table = np.array([int(index(np.array(s), np.array(d), np.array(u))) for s, d, u in states()])
    row = np.full(2 * 22 * 11, -1)
    row[table] = np.arange(len(table))
    cell = row[played.state()] * 2 + played.action
    counts = np.bincount(cell, minlength=560)
    weight = torch.tensor(np.sqrt(counts / counts.mean()), dtype=torch.float32).view(280, 2)
    following = np.where(played.ended, 0, row[played.next_state()])
    best = np.zeros(280)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for sweep in range(sweeps):
        gain = played.reward + np.where(played.ended, 0.0, best[following])
        mean = np.bincount(cell, weights=gain, minlength=560) / np.maximum(counts, 1)
        target = torch.tensor(mean, dtype=torch.float32).view(280, 2)
        for _ in range(120 if sweep == sweeps - 1 else 40):
            loss = (weight * (net(pictures) - target) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            best = net(pictures).max(dim=1).values.double().numpy()
    return net.eval()


def grid_expert(seed: int = 0) -> Expert:
    """The CNN on the state grid, trained from a million played hands."""
    torch.manual_seed(seed)  # before the net is made: its start belongs to the seed
    net = train_net(GridNet(), grid(states()), seed=seed)
    return Expert.from_torch(Decisive(net).eval(), SCHEMA, preprocess=grid, classes=CLASSES)


def untrained_expert(seed: int = 0) -> Expert:
    """The same CNN, never trained (control 5)."""
    torch.manual_seed(seed)
    return Expert.from_torch(Decisive(GridNet()).eval(), SCHEMA, preprocess=grid, classes=CLASSES)


EXPERTS = {"grid": grid_expert, "untrained": untrained_expert}


def decisions(expert: Expert, items: Sequence[State]) -> list[str]:
    """The expert's class name for each state."""
    decision = expert.decide(items)
    assert isinstance(decision, ClassDecision)
    return [decision.classes[i] for i in decision.log_probs.argmax(dim=1).tolist()]


def parse(text: str) -> str | None:
    """ "hit" or "stick" if exactly one of them is in the answer as a word, else None."""
    found = set(re.findall(r"\b(hit|stick)\b", text.lower()))
    return found.pop() if len(found) == 1 else None


def score(expert: Expert, items: Sequence[State], texts: Sequence[str]) -> dict[str, float]:
    """Agreement with the expert, share of parsed answers and, over all 280 states, the exact expected return
    (an answer that cannot be read counts as sticking)."""
    read = [parse(text) for text in texts]
    wanted = decisions(expert, items)
    out = {
        "agreement": sum(a == b for a, b in zip(read, wanted, strict=True)) / len(items),
        "parsed": sum(a is not None for a in read) / len(items),
    }
    if set(items) == set(states()):
        out["return"] = evaluate({s: int(a == "hit") for s, a in zip(items, read, strict=True)}).expected_return
    return out


def in_words(item: State) -> str:
    """The state told in words (control 2)."""
    total, dealer, usable = item
    return f"my sum is {total}, the dealer shows {dealer}, usable ace: {'yes' if usable else 'no'}"


def draw(figure: Any, items: Sequence[State], texts: Sequence[str]) -> None:
    """The 280-state policy of the answers above the optimal one: hard and soft sums against the dealer's card."""
    optimum = optimal_policy()
    said: dict[State, str | None] = {state: parse(text) for state, text in zip(items, texts, strict=True)}
    best: dict[State, str | None] = {state: CLASSES[optimum[state]] for state in items}
    axes = figure.subplots(2, 2)
    shades = {"stick": 0.0, "hit": 1.0, None: 0.5}
    for line, (title, policy) in enumerate((("fused model", said), ("optimal play", best))):
        for column, usable in enumerate((False, True)):
            ax, low = axes[line][column], 12 if usable else 4
            cells = [[shades[policy.get((t, d, usable))] for d in range(1, 11)] for t in range(low, 22)]
            where = (0.5, 10.5, low - 0.5, 21.5)
            ax.imshow(cells, cmap="coolwarm", vmin=0, vmax=1, origin="lower", aspect="auto", extent=where)
            for total, dealer, soft in items:
                if soft == usable and policy[total, dealer, soft] != best[total, dealer, soft]:
                    ax.plot(dealer, total, "k.", markersize=4)
            ax.set(title=f"{title}, {'soft' if usable else 'hard'} sums", xlabel="dealer's card", ylabel="sum")
    figure.text(0.5, 0.005, "red: hit, blue: stick, grey: unreadable; a dot: not the optimal choice", ha="center")


def blackjack_task(expert: str | Expert = "grid", *, seed: int = 0, labels: int = 200) -> Task:
    """`labels` labelled states (a fifth of them for validation), 80 test states, all 280 for the return."""
    if isinstance(expert, str) and expert not in EXPERTS:
        raise InputError(f"unknown Blackjack expert {expert!r}: one of {', '.join(EXPERTS)}")
    chosen = EXPERTS[expert](seed) if isinstance(expert, str) else expert
    everything = states()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(everything))
    names = decisions(chosen, everything)

    def examples(rows: Any) -> tuple[Example, ...]:
        return tuple(Example(PROMPT, {"table": everything[i]}, names[i]) for i in rows)

    labelled = order[TEST_STATES : TEST_STATES + labels]
    held = max(1, labels // 5)
    return Task(
        name="blackjack",
        expert_name="table",
        expert=chosen,
        prompt=PROMPT,
        paraphrases=PARAPHRASES,
        train=examples(labelled[held:]),
        validation=examples(labelled[:held]),
        test=examples(order[:TEST_STATES]),
        all_inputs=tuple(everything),
        parse=parse,
        score=lambda items, texts: score(chosen, items, texts),
        in_words=in_words,
        metric=Metric("return", "exact expected return", digits=4),
        retold=lambda other: blackjack_task(other, seed=seed, labels=labels),
        untrained=untrained_expert,
        exchanged={
            "its outputs exchanged": lambda: permuted(chosen, (1, 0)),
            "hits below 16": lambda: rule(chosen, lambda item: "hit" if item[0] < 16 else "stick"),
            "hits below 19 on soft sums only": lambda: rule(
                chosen, lambda item: "hit" if item[2] and item[0] < 19 else "stick"
            ),
            "hits when the dealer shows 7 or more": lambda: rule(
                chosen, lambda item: "hit" if item[1] >= 7 else "stick"
            ),
        },
        draw=draw,
        landmarks={
            "optimal play": evaluate(optimal_policy()).expected_return,
            "always stick": evaluate(dict.fromkeys(everything, 0)).expected_return,
        },
        options={"expert": expert, "seed": seed, "labels": labels} if isinstance(expert, str) else {},
    )
