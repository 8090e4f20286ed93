"""What a task is: an expert, prompts, split examples, and how an answer in words is read and scored.

A task carries its own functions, so no code elsewhere asks for a task's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from model_fusion.fuse.experts.base import Expert
from model_fusion.fuse.fit import Example


@dataclass(frozen=True)
class Metric:
    """The number of `Task.score` by which the task is judged, over all inputs; `digits` after the point in print."""

    name: str
    label: str
    higher_is_better: bool = True
    digits: int = 3


@dataclass(frozen=True)
class Task:
    """`prompt` and `paraphrases` hold the expert's placeholder; the paraphrases are never trained on.

    parse(text) reads one greedy answer (None: no answer in it). score(items, texts) gives named numbers, always
    `agreement` (with the expert) and `metric.name`. all_inputs covers the whole task, in_words(item) states one of
    them in words.

    For the audit: retold(other) is the same task with another expert's labels and scores; untrained(seed) is the
    expert's architecture, never trained; exchanged makes experts of other opinions that fit the same bridge;
    draw(figure, items, texts) pictures the answers on a matplotlib figure; landmarks are values of the metric to
    compare with; options are what the task's factory needs to make it again.
    """

    name: str
    expert_name: str
    expert: Expert
    prompt: str
    paraphrases: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    all_inputs: tuple[Any, ...]
    parse: Callable[[str], str | float | None]
    score: Callable[[Sequence[Any], Sequence[str]], dict[str, float]]
    in_words: Callable[[Any], str]
    metric: Metric
    retold: Callable[[Expert], Task]
    untrained: Callable[[int], Expert] | None = None
    exchanged: Mapping[str, Callable[[], Expert]] = field(default_factory=dict)
    draw: Callable[[Any, Sequence[Any], Sequence[str]], None] | None = None
    landmarks: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def questions(self) -> tuple[Example, ...]:
        """Every input of the task as a question with the task's prompt; their answers are not given here."""
        return tuple(Example(self.prompt, {self.expert_name: item}, "") for item in self.all_inputs)

    def score_examples(self, examples: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
        """`score` of the answers to examples."""
        return self.score([example.inputs[self.expert_name] for example in examples], texts)

    def record(self) -> dict[str, Any]:
        """What a saved fusion keeps of its task, so that an audit finds it again."""
        return {"name": self.name, "options": dict(self.options)}


def example_key(example: Example) -> str:
    """Equal for equal prompts and inputs, arrays included."""
    return json.dumps([example.prompt, dict(example.inputs)], default=lambda value: value.tolist(), sort_keys=True)
