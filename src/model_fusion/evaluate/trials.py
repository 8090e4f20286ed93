"""Training and asking variants of one fusion on one base: what every control of an audit is made of."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from model_fusion.errors import InputError
from model_fusion.evaluate.tasks.base import Task, example_key
from model_fusion.fuse.align import train_by
from model_fusion.fuse.bridges import BridgeConfig
from model_fusion.fuse.experts.base import Expert
from model_fusion.fuse.fit import Example
from model_fusion.fuse.model import FusedModel

PARAPHRASED_ROWS = 16


class Trials:
    """Variants of the fusion `fused` on `task`, each trained with the settings `training` of the original.

    The saved bridge is never touched: a variant is a fresh bridge beside it on the same base, removed after use.
    """

    def __init__(self, fused: FusedModel, task: Task, training: Mapping[str, Any]) -> None:
        if task.expert_name not in fused.experts:
            raise InputError(
                f"the task {task.name!r} asks expert {task.expert_name!r}, "
                f"but this fusion has {', '.join(fused.experts)}"
            )
        if not fused.bridge.trainable:
            raise InputError(f"the {fused.bridge.kind} bridge trains nothing: there is no training to audit")
        self.fused, self.task, self.training = fused, task, dict(training)
        self.config: BridgeConfig = fused.fusion.config
        self.name = task.expert_name
        self.questions = task.questions()
        place = {example_key(question): number for number, question in enumerate(self.questions)}
        self.test = [place[example_key(example)] for example in task.test]
        self._main: tuple[tuple[int, int | None], FusedModel, ExitStack] | None = None

    @property
    def expert(self) -> Expert:
        return self.task.expert

    @property
    def top(self) -> FusedModel:
        """The model whose bridge is the active one on the base."""
        return self._main[1] if self._main else self.fused

    @property
    def label_count(self) -> int:
        """All labelled examples, validation included."""
        return len(self.task.train) + len(self.task.validation)

    def items(self) -> list[Any]:
        """The audited expert's input of every question."""
        return [question.inputs[self.name] for question in self.questions]

    def labelled(self, count: int | None, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
        """(training, validation) of `count` labels in all, drawn by the seed; None: the task's own split."""
        if count is None or count >= self.label_count:
            return self.task.train, self.task.validation
        if count < 4:
            raise InputError(f"{count} labels: training and validation need at least 4")
        rows = [*self.task.train, *self.task.validation]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()[:count]
        held = max(1, count // 5)
        return [rows[i] for i in order[held:]], [rows[i] for i in order[:held]]

    def fit(self, model: FusedModel, seed: int, labels: int | None = None) -> None:
        """Train the active bridge of `model`: same settings as the fusion's, another seed."""
        train, validation = self.labelled(labels, seed)
        train_by(model, train, validation, {**self.training, "seed": seed}, progress=False)

    @contextmanager
    def beside(
        self, bridge: BridgeConfig, experts: Mapping[str, Expert] | None = None, *, seed: int = 0
    ) -> Iterator[FusedModel]:
        """A fresh `bridge` on the same base, reading `experts` (of any feature shape) in place of the fusion's."""
        top = self.top
        other = copy.copy(top)
        other.experts = {**self.fused.experts, **(experts or {})}
        before, name = top.active, f"audit{len(top.fusions)}"
        other.add_bridge(name, bridge, seed=seed)
        try:
            yield other
        finally:
            other.set_bridge(before)
            other.remove_bridge(name)

    @contextmanager
    def trained(
        self, seed: int, *, experts: Mapping[str, Expert] | None = None, labels: int | None = None
    ) -> Iterator[FusedModel]:
        """A variant of the fusion trained from scratch; everything but the arguments is as in the original."""
        with self.beside(self.config, experts, seed=seed) as model:
            self.fit(model, seed, labels)
            yield model

    def main(self, seed: int, labels: int | None = None) -> FusedModel:
        """The fusion itself, trained with `seed` on so many labels (None: all); kept until another is asked for."""
        if self._main is None or self._main[0] != (seed, labels):
            self.close()
            stack = ExitStack()
            model = stack.enter_context(self.trained(seed, labels=labels))
            self._main = ((seed, labels), model, stack)
        return self._main[1]

    def close(self) -> None:
        """Remove the bridge that `main` keeps."""
        if self._main is not None:
            (_, _, stack), self._main = self._main, None
            stack.close()

    def ask(self, model: FusedModel, questions: Sequence[Example] | None = None) -> list[str]:
        """Greedy answers of `model` to all questions of the task (or those given)."""
        chosen = self.questions if questions is None else questions
        return answers(model, [q.prompt for q in chosen], [q.inputs for q in chosen])

    def scores(self, texts: Sequence[str], task: Task | None = None) -> dict[str, float]:
        """The task's scores of answers to all questions; `agreement` over its test rows only."""
        task = task or self.task
        whole = task.score_examples(self.questions, texts)
        rows = [self.questions[i] for i in self.test]
        return {**whole, "agreement": task.score_examples(rows, [texts[i] for i in self.test])["agreement"]}

    def paraphrases(self, model: FusedModel) -> dict[str, float]:
        """Agreement when asked in words never trained on; nothing where the task has no paraphrases."""
        rows = self.test[:: max(1, len(self.test) // PARAPHRASED_ROWS)][:PARAPHRASED_ROWS]
        asked = [Example(prompt, self.questions[i].inputs, "") for prompt in self.task.paraphrases for i in rows]
        if not asked:
            return {}
        return {"paraphrases": self.task.score_examples(asked, self.ask(model, asked))["agreement"]}


def answers(model: FusedModel, prompts: Sequence[str], inputs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Greedy answers, each distinct row asked once. Rows of equal length are asked together: what they begin with
    is then read once."""
    groups: dict[int, dict[str, list[int]]] = {}
    for number, row in enumerate(model.processor.encode(prompts, inputs)):
        key = repr([row.ids, [(o.expert, o.values.tolist(), o.mask.tolist()) for o in row.occurrences]])
        groups.setdefault(len(row.ids), {}).setdefault(key, []).append(number)
    found = [""] * len(prompts)
    for rows in groups.values():
        first = [numbers[0] for numbers in rows.values()]
        texts = model.answer([prompts[i] for i in first], [inputs[i] for i in first])
        for numbers, text in zip(rows.values(), texts, strict=True):
            for number in numbers:
                found[number] = text
    return found
