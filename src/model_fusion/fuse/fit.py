"""Training a bridge: examples in, the objective `answers` (cross-entropy on whole answers and the end of turn)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError
from model_fusion.fuse.bridges.base import BridgeConfig
from model_fusion.fuse.experts.base import Features
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.processor import Encoded, Occurrence
from model_fusion.fuse.shortcut import Shortcut
from model_fusion.training.loop import History, Measure, TrainSettings, train

T = TypeVar("T")


class ExampleLike(Protocol):
    """What `fit` reads of an example."""

    @property
    def prompt(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def answer(self) -> str: ...


@dataclass(frozen=True)
class Example:
    """A prompt with placeholders, the experts' inputs by name, and the answer to learn."""

    prompt: str
    inputs: Mapping[str, Any]
    answer: str


def fit(
    fused: FusedModel,
    examples: Sequence[ExampleLike | Mapping[str, Any]],
    *,
    validation: Sequence[ExampleLike | Mapping[str, Any]] = (),
    resume: str | Path | None = None,
    keep: bool = False,
    progress: bool = True,
    fit_normaliser: bool = True,
    keep_language: float = 0.0,
    **settings: Any,
) -> History:
    """Train the active bridge on `examples` (or mappings with the same three keys, such as a dataset's rows). Features
    are encoded once; normalisers are fitted on `examples` only.

    keep_language: weight of a second loss, KL to the text oracle over generic prompts (the objective `align`), so
    that the LLM still speaks as itself of other things while the expert's signal is present. It costs a few more
    rows a step.

    settings: fields of `TrainSettings`; what is not given comes from the bridge's own defaults. Without
    `validation`, a fifth of the examples (at least one) is held out by the seed. `resume` and `keep` as in `train`.
    Raises InputError.
    """
    if not fused.bridge.trainable:
        raise InputError(f"the {fused.bridge.kind} bridge has nothing to train: ask it directly")
    if len(examples) < 2:
        raise InputError(f"{len(examples)} training examples: at least 2 are needed")
    chosen = training_settings({**_defaults(fused), **settings})
    shown, unseen = checked_examples(examples, "example"), checked_examples(validation, "validation example")
    if not unseen:
        shown, unseen = held_out(shown, chosen.seed)
    if keep_language < 0:
        raise InputError(f"keep_language is a weight of at least 0, got {keep_language}")
    rows = encode(fused, shown)  # the only time that the experts read the training inputs
    if fit_normaliser:
        fit_normalisers(fused, rows)
    answers = AnswerStep(fused, rows)
    step: nn.Module = _with_language(fused, answers, shown, keep_language) if keep_language else answers
    held = AnswerStep(fused, encode(fused, unseen), shortcut=None)
    torch.manual_seed(chosen.seed)
    fused.train()
    try:
        return train(
            step,
            fused.trainable_parameters(),
            len(shown),
            lambda: held.measure(chosen.batch_size * 2),
            chosen,
            resume=Path(resume) if resume else None,
            keep=keep,
            fingerprint=f"{fingerprint(fused, answers.rows, chosen)} {keep_language}",
            progress=progress,
        )
    finally:
        fused.eval()


def checked_examples(examples: Sequence[Any], where: str) -> list[Example]:
    """Examples, or mappings of their fields, as `Example`s. Raises InputError naming the first that is neither."""
    found = []
    for number, one in enumerate(examples, 1):
        read = one.get if isinstance(one, Mapping) else lambda key, one=one: getattr(one, key, None)
        prompt, inputs, answer = read("prompt"), read("inputs"), read("answer")
        if not isinstance(prompt, str) or answer is None or not isinstance({} if inputs is None else inputs, Mapping):
            raise InputError(
                f"{where} {number}: expected prompt, inputs (by expert's name) and answer, got {one!r:.80}"
            )
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise InputError(f"{where} {number}: the answer is the text that the LLM shall say, got {answer!r:.80}")
        # A dataset's rows have every key that any of them has: what is None is not given.
        given = {name: item for name, item in (inputs or {}).items() if item is not None}
        found.append(Example(prompt, given, str(answer)))
    return found


def training_settings(settings: Mapping[str, Any]) -> TrainSettings:
    """`settings` by name; an unknown name is an InputError."""
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    for name in settings:
        if name not in known:
            raise InputError(f"unknown training setting {name!r}; known: {', '.join(sorted(known))}")
    return TrainSettings(**settings)


def _defaults(fused: FusedModel) -> dict[str, Any]:
    config: BridgeConfig = fused.fusion.config
    return dict(config.training)


class AnswerStep(nn.Module):
    """Loss over the answers of the rows that indices name. A module, so that accelerate can wrap it."""

    def __init__(self, fused: FusedModel, rows: Sequence[Encoded], shortcut: Shortcut | None = None) -> None:
        super().__init__()
        self.fused, self.rows = fused, list(rows)
        self.shortcut = shortcut or Shortcut(fused, self.rows)

    def forward(self, indices: Tensor) -> Tensor:
        """Mean cross-entropy over the answer tokens (end of turn included) of rows `indices` int64 [b]."""
        logits, labels = self.shortcut.logits([self.rows[i] for i in indices.tolist()])
        keep = labels[:, 1:] != -100
        return nn.functional.cross_entropy(logits[:, :-1][keep].float(), labels[:, 1:][keep])

    @torch.no_grad()
    def measure(self, batch_size: int) -> Measure:
        """Mean loss, and the share of rows whose every answer token is the most probable one: the rows that
        greedy decoding answers exactly as labelled."""
        training = self.fused.training
        self.fused.eval()
        losses, right = [], []
        for start in range(0, len(self.rows), batch_size):
            logits, labels = self.shortcut.logits(self.rows[start : start + batch_size])
            labels, logits = labels[:, 1:], logits[:, :-1].float()
            keep = labels != -100
            losses.append(nn.functional.cross_entropy(logits[keep], labels[keep], reduction="none"))
            right.append(((logits.argmax(-1) == labels) | ~keep).all(dim=1))
        self.fused.train(training)
        return Measure(float(torch.cat(losses).mean()), float(torch.cat(right).float().mean()))


def encode(fused: FusedModel, examples: Sequence[ExampleLike]) -> list[Encoded]:
    """Examples as rows of ids with features, encoded once."""
    return fused.processor.encode(
        [e.prompt for e in examples], [e.inputs for e in examples], [e.answer for e in examples]
    )


def expert_items(fused: FusedModel, examples: Sequence[ExampleLike]) -> dict[str, list[Any]]:
    """For each expert its inputs over `examples`, in order."""
    found: dict[str, list[Any]] = {name: [] for name in fused.experts}
    for example in examples:
        for name in fused.experts:
            if name in example.inputs:
                several = example.prompt.count(f"<|{name}|>") > 1
                found[name] += list(example.inputs[name]) if several else [example.inputs[name]]
    return found


def fit_normalisers(fused: FusedModel, rows: Sequence[Encoded]) -> None:
    """Fit each expert's normaliser on its features in `rows`. Raises InputError where one has none."""
    for name, found in occurrences(fused, rows).items():
        if not found:
            raise InputError(f"no training example has an input for expert {name!r}")
        features = Features(torch.stack([o.values for o in found]), torch.stack([o.mask for o in found]))
        fused.normalisers[name].fit(features)  # type: ignore[operator]


def occurrences(fused: FusedModel, rows: Sequence[Encoded]) -> dict[str, list[Occurrence]]:
    """For each expert its occurrences in `rows`, in order: those of `expert_items`, read."""
    found: dict[str, list[Occurrence]] = {name: [] for name in fused.experts}
    names = tuple(fused.experts)
    for row in rows:
        for occurrence in row.occurrences:
            found[names[occurrence.expert]].append(occurrence)
    return found


def _with_language(fused: FusedModel, answers: AnswerStep, examples: Sequence[ExampleLike], weight: float) -> nn.Module:
    from model_fusion.fuse.align import ROWS_A_PROMPT, AlignStep, described, generic_prompts
    from model_fusion.fuse.teacher import Teacher

    items = described(fused, expert_items(fused, examples), occurrences(fused, answers.rows))
    language = AlignStep(fused, Teacher(fused), generic_prompts(tuple(fused.experts)), items)

    class Both(nn.Module):
        """Loss over the answers, and `weight` times the KL over a few items after a generic prompt."""

        def __init__(self) -> None:
            super().__init__()
            self.answers, self.language = answers, language

        def forward(self, indices: Tensor) -> Tensor:
            loss: Tensor = self.answers(indices)
            kept: Tensor = self.language(indices[:ROWS_A_PROMPT] % len(items))
            return loss + weight * kept

    return Both()


def collator(fused: FusedModel, examples: Sequence[Any]) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """Fit the normalisers on `examples`, and return what turns rows like them into a training batch with labels: the
    `data_collator` of transformers' Trainer or TRL's (with remove_unused_columns=False). Raises InputError."""
    fit_normalisers(fused, encode(fused, checked_examples(examples, "example")))

    def collate(rows: Sequence[Any]) -> dict[str, Tensor]:
        return fused.processor.collate(encode(fused, checked_examples(rows, "row")), labels=True)

    return collate


def held_out(examples: Sequence[T], seed: int, share: float = 0.2) -> tuple[list[T], list[T]]:
    """(training, validation): `share` of the examples, at least one, are held out, chosen by the seed."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, int(len(examples) * share))
    return [examples[i] for i in sorted(order[count:])], [examples[i] for i in sorted(order[:count])]


def fingerprint(fused: FusedModel, rows: Sequence[Encoded], settings: TrainSettings) -> str:
    """SHA-256 over the bridge's config, the settings, and every row's ids and features."""
    digest = hashlib.sha256(
        json.dumps([fused.fusion.config.to_json(), dataclasses.asdict(settings)], sort_keys=True).encode()
    )
    for row in rows:
        digest.update(repr(row.ids).encode())
        for occurrence in row.occurrences:
            digest.update(occurrence.values.numpy().tobytes())
    return digest.hexdigest()
