"""What a task is: an expert, prompts, split examples, and how an answer in words is read and scored.

A task carries its own functions, so no code elsewhere asks for a task's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from model_fusion.fuse.experts.base import Expert
from model_fusion.fuse.fit import Example


@dataclass(frozen=True)
class Task:
    """`prompt` and `paraphrases` hold the expert's placeholder; the paraphrases are never trained on.

    parse(text) reads one greedy answer (None: no answer in it). score(items, texts) gives named numbers.
    all_inputs covers the whole task, in_words(item) states one of them in words.
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
