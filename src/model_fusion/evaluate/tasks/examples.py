"""A user's own examples as a task: how their answers are read and scored, and the controls that make sense for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model_fusion.errors import InputError
from model_fusion.evaluate.tasks.base import Metric, Task, example_key
from model_fusion.evaluate.tasks.exchanged import mirrored, permuted
from model_fusion.evaluate.tasks.reading import Reading, plain, reading_of
from model_fusion.fuse.experts.base import ClassDecision, Expert, ValueDecision
from model_fusion.fuse.fit import Example
from model_fusion.fuse.placeholders import placeholder

LEAST = 10
CLOSE = 0.05
"""A number agrees with another where it differs by no more than this share of it."""


@dataclass(frozen=True)
class ExamplesTask(Task):
    """Its questions are the test examples, each with its own prompt."""

    def questions(self) -> tuple[Example, ...]:
        return tuple(Example(example.prompt, example.inputs, "") for example in self.test)

    def score_examples(self, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
        return self.score(examples, texts)


def examples_task(examples: Sequence[Example], experts: Mapping[str, Expert], *, seed: int = 0) -> ExamplesTask:
    """Three tenths of the examples, drawn by the seed, are the test; an eighth of the rest is for validation.

    An answer is read as `reading_of` says: an LLM that is told something and answers in a sentence is right as well.
    The first expert that the examples name is audited. Where the answers are this expert's own decisions, another can
    be put in its place (control 12). Raises InputError.
    """
    if len(examples) < LEAST:
        raise InputError(f"{len(examples)} examples: an audit needs at least {LEAST}")
    name = next((name for name in experts if name in examples[0].inputs), None)
    if name is None:
        raise InputError(f"the examples name none of the experts {', '.join(experts)}")
    if any(name not in example.inputs for example in examples):
        raise InputError(f"every example needs an input for expert {name!r}, which the first one has")
    if any(example.prompt.count(placeholder(name)) != 1 for example in examples):
        raise InputError(f"every example needs {placeholder(name)} once in its prompt to be audited")
    expert = experts[name]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [examples[i] for i in order]
    test, rest = rows[: len(rows) * 3 // 10], rows[len(rows) * 3 // 10 :]
    held = max(1, len(rest) // 8)
    classes = getattr(expert, "classes", None) or ()
    answers, named = [e.answer for e in examples], {plain(c) for c in classes}
    reading = reading_of(answers, classes if {plain(a) for a in answers} <= named else ())
    return _task(name, expert, reading, (rest[held:], rest[:held], test))


def _task(
    name: str, expert: Expert, reading: Reading, splits: tuple[Sequence[Example], Sequence[Example], Sequence[Example]]
) -> ExamplesTask:
    train, validation, test = splits
    answers = {example_key(e): reading.read(e.answer) for e in test}
    guess = float(np.mean([float(e.answer) for e in train])) if reading.numbers else None

    def score(examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
        wanted, read = [answers[example_key(e)] for e in examples], [reading.read(text) for text in texts]
        parsed = {"parsed": sum(r is not None for r in read) / len(read)}
        if guess is None:
            return {"agreement": _share(read, wanted), **parsed}
        values = np.array(wanted, dtype=np.float64)
        said = np.array([guess if r is None else r for r in read], dtype=np.float64)  # unread: the constant guess
        off = np.abs(said - values)
        return {"agreement": float(np.mean(off <= CLOSE * np.abs(values))), "error": float(off.mean()), **parsed}

    def retold(other: Expert) -> ExamplesTask:
        said = other.describe([e.inputs[name] for e in test])
        told = [Example(e.prompt, e.inputs, a) for e, a in zip(test, said, strict=True)]
        return _task(name, other, reading, (train, validation, told))

    exchanged = _exchanged(expert, reading, [e.inputs[name] for e in test], [e.answer for e in test])
    return ExamplesTask(
        name="your examples",
        expert_name=name,
        expert=expert,
        prompt=test[0].prompt,
        paraphrases=(),
        train=tuple(train),
        validation=tuple(validation),
        test=tuple(test),
        all_inputs=tuple(e.inputs[name] for e in test),
        parse=reading.read,
        score=score,
        in_words=lambda item: expert.inputs.words(expert.inputs.check(item)),
        metric=Metric("error", "mean absolute error", higher_is_better=False)
        if reading.numbers
        else Metric("agreement", f"right ({reading.label})"),
        retold=retold,
        exchanged=exchanged,
    )


def _share(read: Sequence[Any], wanted: Sequence[Any]) -> float:
    """How many answers are the wanted ones; one that cannot be read never is."""
    return float(np.mean([a is not None and a == b for a, b in zip(read, wanted, strict=True)]))


def _exchanged(
    expert: Expert, reading: Reading, items: Sequence[Any], answers: Sequence[str]
) -> dict[str, Callable[[], Expert]]:
    """Another expert for control 12, where the answers are this one's own decisions; else none."""
    decision = _decides(expert, items)
    if isinstance(decision, ClassDecision):
        names = [plain(decision.classes[i]) for i in decision.log_probs.argmax(-1).tolist()]
        if names != [plain(answer) for answer in answers]:
            return {}
        turned = [*range(1, len(decision.classes)), 0]
        return {"its outputs shifted by one": lambda: permuted(expert, turned)}
    if isinstance(decision, ValueDecision) and reading.numbers:
        values = decision.value.double().numpy()
        if (np.abs(np.array(answers, dtype=np.float64) - values) <= CLOSE * np.abs(values)).all():
            low, high = float(values.min()), float(values.max())
            return {"its values turned over": lambda: mirrored(expert, low, high)}
    return {}


def _decides(expert: Expert, items: Sequence[Any]) -> ClassDecision | ValueDecision | None:
    """The expert's decision, or None where it has features only."""
    try:
        return expert.decide(items)
    except InputError:
        return None
