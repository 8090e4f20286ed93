"""A user's own examples as a task: exact match of answers, and the controls that make sense for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model_fusion.errors import InputError
from model_fusion.evaluate.tasks.base import Metric, Task, example_key
from model_fusion.evaluate.tasks.exchanged import permuted
from model_fusion.fuse.experts.base import ClassDecision, Expert, ValueDecision
from model_fusion.fuse.fit import Example
from model_fusion.fuse.placeholders import placeholder

LEAST = 10


@dataclass(frozen=True)
class ExamplesTask(Task):
    """Its questions are the test examples, each with its own prompt."""

    def questions(self) -> tuple[Example, ...]:
        return tuple(Example(example.prompt, example.inputs, "") for example in self.test)

    def score_examples(self, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
        return self.score(examples, texts)


def examples_task(examples: Sequence[Example], experts: Mapping[str, Expert], *, seed: int = 0) -> ExamplesTask:
    """Three tenths of the examples, drawn by the seed, are the test; an eighth of the rest is for validation.

    The first expert that the examples name is audited. Where every answer is the name of the class that this expert
    decides, its outputs can be exchanged (control 12). Raises InputError.
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
    return _task(name, expert, rest[held:], rest[:held], test)


def _task(
    name: str, expert: Expert, train: Sequence[Example], validation: Sequence[Example], test: Sequence[Example]
) -> ExamplesTask:
    answers = {example_key(e): e.answer for e in test}

    def score(examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
        wanted = [answers[example_key(e)] for e in examples]
        return {"agreement": sum(same(a, b) for a, b in zip(texts, wanted, strict=True)) / len(texts)}

    def retold(other: Expert) -> ExamplesTask:
        said = other.describe([e.inputs[name] for e in test])
        return _task(
            name, other, train, validation, [Example(e.prompt, e.inputs, a) for e, a in zip(test, said, strict=True)]
        )

    swapped = {}
    decision = _decides(expert, [e.inputs[name] for e in test])
    if isinstance(decision, ClassDecision) and all(
        same(e.answer, decision.classes[int(i)]) for e, i in zip(test, decision.log_probs.argmax(-1), strict=True)
    ):
        turned = [*range(1, len(decision.classes)), 0]
        swapped = {"its outputs shifted by one": lambda: permuted(expert, turned)}
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
        parse=lambda text: text,
        score=score,
        in_words=lambda item: f"input {item}",
        metric=Metric("agreement", "exact match"),
        retold=retold,
        exchanged=swapped,
    )


def _decides(expert: Expert, items: Sequence[Any]) -> ClassDecision | ValueDecision | None:
    """The expert's decision, or None where it has features only."""
    try:
        return expert.decide(items)
    except InputError:
        return None


def same(a: str, b: str) -> bool:
    """Equal but for case, outer white space and a full stop at the end."""
    return a.strip().rstrip(".").casefold() == b.strip().rstrip(".").casefold()
