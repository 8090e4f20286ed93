"""The objective `align`: no labels. The frozen LLM, reading the expert's soft tokens, learns to continue as the same
LLM does (bridge off) when it is told `describe()`'s words in their place.

Loss: KL(oracle || fused) at every token of the oracle's own continuation, over prompts that any task can use. Soft
tokens start near the embeddings of the words they stand for (`spell`), which needs no pass through the LLM.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError
from model_fusion.fuse.fit import ExampleLike, fingerprint, fit_normalisers, held_out, training_settings
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.placeholders import placeholder
from model_fusion.fuse.processor import Encoded, Occurrence, check_features
from model_fusion.fuse.shortcut import Shortcut
from model_fusion.fuse.teacher import Prompt, Teacher, kl
from model_fusion.training.loop import History, Measure, train

ROWS_A_PROMPT = 4
"""Rows of a batch that share a prompt, and so what the LLM computes before the placeholder."""
TRAINING: Mapping[str, Any] = {
    "steps": 40,
    "batch_size": 8,
    "learning_rate": 5e-4,
    "validate_every": 10,
    "patience": 3,
    "target": (0.95, 0.005),
}


@dataclass(frozen=True)
class Item:
    """One input of one expert: its features as the LLM will read them, and what the expert says of it."""

    expert: str
    given: Any
    occurrence: Occurrence
    words: str


def align(
    fused: FusedModel,
    items: Sequence[Any],
    *,
    prompts: Sequence[Prompt] = (),
    validation: Sequence[Any] = (),
    tokens: int = 8,
    top_k: int = 256,
    start_at_words: bool = True,
    resume: str | Path | None = None,
    keep: bool = False,
    progress: bool = True,
    fit_normaliser: bool = True,
    **settings: Any,
) -> History:
    """Train the active bridge on unlabelled `items`: inputs of the one expert, or mappings from experts' names to
    inputs. `prompts` hold placeholders and stand beside the generic ones; a fifth of all prompts, and `validation`
    or a fifth of the items, are held out to stop on. Where the start at the words' embeddings reaches the target
    (share of held-out continuations that are the oracle's, KL), nothing more is trained.

    tokens: how far the oracle is followed. top_k: how many of its next-token probabilities are kept. resume, keep
    and settings as in `fit`. Raises InputError.
    """
    if not fused.bridge.trainable:
        raise InputError(f"the {fused.bridge.kind} bridge has nothing to train: ask it directly")
    begun, chosen = time.monotonic(), training_settings({**TRAINING, **settings})
    if not validation:
        items, validation = held_out(items, chosen.seed)
    shown, unseen = read(fused, items), read(fused, validation)
    if fit_normaliser:
        fit_normalisers(fused, [Encoded([], 0, [item.occurrence]) for item in shown])
    torch.manual_seed(chosen.seed)
    if start_at_words:
        spell(fused, shown)
    asked, held_back = held_out([*generic_prompts(tuple(fused.experts)), *prompts], chosen.seed)
    teacher = Teacher(fused, tokens=tokens, top_k=top_k)
    step = AlignStep(fused, teacher, asked, shown)
    held = AlignStep(fused, teacher, held_back, unseen)
    parameters = fused.trainable_parameters()
    start, before = held.measure(), [p.detach().clone() for p in parameters]
    if chosen.target and start.score >= chosen.target[0] and start.loss <= chosen.target[1]:
        return History(
            validations=[(0, start.loss, start.score)], stopped="target reached", seconds=time.monotonic() - begun
        )
    fused.train()
    try:
        history = train(
            step,
            parameters,
            len(shown),
            held.measure,
            chosen,
            resume=Path(resume) if resume else None,
            keep=keep,
            fingerprint=fingerprint(fused, [*step.templates, *(Encoded([], 0, [i.occurrence]) for i in shown)], chosen),
            progress=progress,
        )
    finally:
        fused.eval()
    history.validations.insert(0, (0, start.loss, start.score))
    best = max(history.validations, key=lambda v: (v[2], -v[1]))
    if best[0] == 0:  # the words' own embeddings were better than what training made of them
        history.best_step = 0
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
    return history


def train_by(
    fused: FusedModel,
    examples: Sequence[ExampleLike],
    validation: Sequence[ExampleLike],
    training: Mapping[str, Any],
    **options: Any,
) -> History:
    """Train as a saved fusion's record says: `training` holds the arguments of `fit`, or of `align` where its
    `objective` is "align", which reads the examples' inputs only. `options` go to either."""
    settings = dict(training)
    if settings.pop("objective", "answers") == "answers":
        return fused.fit(examples, validation=validation, **settings, **options)
    shown, unseen = ([dict(example.inputs) for example in some] for some in (examples, validation))
    return fused.align(shown, validation=unseen, **settings, **options)


def generic_prompts(experts: Sequence[str]) -> list[Prompt]:
    """The prompts in the package, once for each expert: talk about a value, pass it on, or speak of something else."""
    text = resources.files("model_fusion.fuse").joinpath("texts", "align_prompts.json").read_text(encoding="utf-8")
    found: list[Prompt] = []
    for name in experts:
        found += json.loads(text.replace("<|expert|>", placeholder(name)))
    return found


def given(fused: FusedModel, items: Sequence[Any]) -> dict[str, list[Any]]:
    """For each expert its inputs among `items`. Raises InputError where one has none."""
    names = tuple(fused.experts)
    if len(names) == 1 and not (items and isinstance(items[0], Mapping) and set(items[0]) == set(names)):
        found = {names[0]: list(items)}
    else:
        found = {name: [item[name] for item in items if name in item] for name in names}
    for name in names:
        if not found[name]:
            raise InputError(f"align: no item has an input for expert {name!r}")
    return found


def read(fused: FusedModel, items: Sequence[Any]) -> list[Item]:
    """Features and words of `items`, each expert asked once."""
    found = {}
    inputs = given(fused, items)
    for number, (name, expert) in enumerate(fused.experts.items()):
        features = check_features(name, expert, expert.encode(inputs[name]))
        pairs = zip(features.values, features.mask, strict=True)
        found[name] = [Occurrence(number, values, mask) for values, mask in pairs]
    return described(fused, inputs, found)


def described(
    fused: FusedModel, inputs: Mapping[str, Sequence[Any]], found: Mapping[str, Sequence[Occurrence]]
) -> list[Item]:
    """Each expert's `inputs`, `found` as features, with what the expert says of them."""
    return [
        Item(name, one, occurrence, words)
        for name, mine in inputs.items()
        if mine
        for one, occurrence, words in zip(mine, found[name], fused.experts[name].describe(mine), strict=True)
    ]


def spell(fused: FusedModel, items: Sequence[Item], *, steps: int = 400, learning_rate: float = 3e-3) -> float:
    """Fit each expert's soft tokens to the LLM's own embeddings of its words, by least squares; returns the mean
    squared error as a share of the embeddings' mean square. A bridge without trained soft tokens is left alone."""
    error = 0.0
    for name in fused.experts:
        mine = [item for item in items if item.expert == name]
        words = sorted({item.words for item in mine})
        rows = torch.stack([_spelled(fused, word, fused.bridge.slots(name)) for word in words])
        fitted = fused.bridge.start_at(name, rows)
        if not fitted:
            continue
        wanted = rows[[words.index(item.words) for item in mine]]
        values = fused.normalisers[name](torch.stack([item.occurrence.values for item in mine]).to(fused.device))
        mask = torch.stack([item.occurrence.mask for item in mine]).to(fused.device)
        optimizer = torch.optim.Adam(fitted, lr=learning_rate)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            loss = (fused.bridge.embed(name, values, mask) - wanted).pow(2).mean() / wanted.pow(2).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            falling.step()
        error = max(error, float(loss.detach()))
    return error


@torch.no_grad()
def _spelled(fused: FusedModel, words: str, slots: int) -> Tensor:
    """Embeddings float32 [slots, H] that spell `words`: spaces before where there is room, else means of
    neighbouring tokens."""
    tokenizer = fused.tokenizer
    ids = tokenizer(" " + words, add_special_tokens=False)["input_ids"]
    space = tokenizer(" ", add_special_tokens=False)["input_ids"][-1:]
    ids = [*space * (slots - len(ids)), *ids]
    rows = fused.base.get_input_embeddings()(torch.tensor(ids, device=fused.device)).float()
    return torch.stack([piece.mean(0) for piece in torch.tensor_split(rows, slots)])


class AlignStep(nn.Module):
    """Mean KL over the oracle's continuations. Which prompts a batch is shown with follows from its indices."""

    def __init__(self, fused: FusedModel, teacher: Teacher, prompts: Sequence[Prompt], items: Sequence[Item]) -> None:
        super().__init__()
        self.fused, self.items = fused, list(items)
        names = tuple(fused.experts)
        self.asked = [asks(prompt, names) for prompt in prompts]
        self.templates = templates(fused, prompts, self.asked, items)
        self.prompts, self.teacher = list(prompts), teacher
        self.shortcuts: dict[int, Shortcut] = {}

    def forward(self, indices: Tensor) -> Tensor:
        """Mean KL in nats a token for the items `indices` int64 [b], a few of them after each prompt."""
        chosen = indices.tolist()
        generator = torch.Generator().manual_seed(hash(tuple(chosen)) & 0xFFFFFFFF)
        found = []
        for start in range(0, len(chosen), ROWS_A_PROMPT):
            items = [self.items[i] for i in chosen[start : start + ROWS_A_PROMPT]]
            for name in dict.fromkeys(item.expert for item in items):
                prompts = [i for i, asked in enumerate(self.asked) if asked == name]
                prompt = prompts[int(torch.randint(len(prompts), (1,), generator=generator))]
                found.append(self.divergence(prompt, [item for item in items if item.expert == name])[0])
        return torch.cat(found).mean()

    def divergence(self, prompt: int, items: Sequence[Item]) -> tuple[Tensor, list[bool]]:
        """KL float32 [n] at each token of what the oracle says about `items` after prompt number `prompt`, and for
        each item whether greedy decoding says the same."""
        template = self.templates[prompt]
        said = self.teacher.continuations(self.prompts[prompt], [{item.expert: item.words} for item in items])
        rows = [
            replace(template, ids=[*template.ids, *c.ids], occurrences=[item.occurrence])
            for c, item in zip(said, items, strict=True)
        ]
        if prompt not in self.shortcuts:
            self.shortcuts[prompt] = Shortcut(self.fused, rows)
        logits, labels = self.shortcuts[prompt].logits(rows)
        keep = labels[:, 1:] != -100
        logits = logits[:, :-1]
        top, log_probs = (torch.cat([getattr(c, f) for c in said]).to(logits.device) for f in ("top", "log_probs"))
        same = ((logits.argmax(-1) == labels[:, 1:]) | ~keep).all(dim=1).tolist()
        return kl(top, log_probs, logits[keep]), same

    @torch.no_grad()
    def measure(self) -> Measure:
        """Mean KL, and the share of continuations that greedy decoding repeats, over a few items for each prompt."""
        training = self.fused.training
        self.fused.eval()
        losses, same = [], []
        for prompt, name in enumerate(self.asked):
            mine = [item for item in self.items if item.expert == name]
            several = [mine[(prompt * ROWS_A_PROMPT + i) % len(mine)] for i in range(min(len(mine), ROWS_A_PROMPT))]
            loss, equal = self.divergence(prompt, several)
            losses.append(loss)
            same += equal
        self.fused.train(training)
        return Measure(float(torch.cat(losses).mean()), sum(same) / len(same))


def asks(prompt: Prompt, experts: Sequence[str]) -> str:
    """The one expert whose placeholder stands in `prompt`, once. Raises InputError otherwise."""
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    found = [name for name in experts for _ in range(text.count(placeholder(name)))]
    if len(found) != 1:
        raise InputError(f"align: a prompt needs exactly one placeholder, {text!r} has {len(found)}")
    return found[0]


def templates(
    fused: FusedModel, prompts: Sequence[Prompt], asked: Sequence[str], items: Sequence[Item]
) -> list[Encoded]:
    """`prompts` as rows of ids; the occurrence in each is that of some item of its expert."""
    some = {item.expert: item.given for item in reversed(items)}
    return fused.processor.encode(prompts, [{name: some[name]} for name in asked])
