"""Composition: questions about the expert's signal that no training ever asked, judged beside the text oracle.

A question type counts only where the oracle (the same LLM told the expert's word) beats the best constant answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_fusion.errors import InputError

MARGIN = 0.2
"""How far the oracle must beat the best constant answer for a type to count."""


@dataclass(frozen=True)
class QuestionType:
    """One few-shot question: `answers` are right for the classes `names`, in order; the classes at `shown` are the
    turns answered beforehand. `turn` holds {digit} and {question}."""

    name: str
    question: str
    answers: tuple[str, ...]
    names: tuple[str, ...]
    shown: tuple[int, ...]
    turn: str

    def prompt(self, said: str) -> list[dict[str, str]]:
        """The conversation with `said`, a word or a placeholder, in the turn to be answered."""
        turns = []
        for number in self.shown:
            turns += [self._asked(self.names[number]), {"role": "assistant", "content": self.answers[number]}]
        return [*turns, self._asked(said)]

    def _asked(self, said: str) -> dict[str, str]:
        return {"role": "user", "content": self.turn.format(digit=said, question=self.question)}


def question_types(file: Path) -> list[QuestionType]:
    """The types in a JSON file of `names`, `shown`, `turn` and `types`. Raises InputError where answers and names
    differ in number."""
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    found = [
        QuestionType(name, t["question"], tuple(t["answers"]), tuple(data["names"]), tuple(data["shown"]), data["turn"])
        for name, t in data["types"].items()
    ]
    for one in found:
        if len(one.answers) != len(one.names):
            raise InputError(f"{file}: {one.name} has {len(one.answers)} answers for {len(one.names)} names")
    return found


def exact(text: str, answer: str) -> bool:
    """Is `text` the answer and nothing else? Space around it and one final full stop do not matter; "odd or even"
    is not "odd"."""
    return text.strip().removesuffix(".") == answer.strip().removesuffix(".")


def accuracy(texts: Sequence[str], answers: Sequence[str]) -> float:
    """Share of `texts` that are exactly their answer."""
    return sum(exact(t, a) for t, a in zip(texts, answers, strict=True)) / len(texts)


def best_constant(answers: Sequence[str]) -> float:
    """Accuracy of the one answer that is right most often."""
    return max(Counter(answers).values()) / len(answers)


@dataclass(frozen=True)
class Scored:
    """One type over held-out inputs: accuracies, and `same`, the share of texts equal to the oracle's."""

    fused: float
    oracle: float
    constant: float
    same: float

    @property
    def counts(self) -> bool:
        return self.oracle >= self.constant + MARGIN


def scored(texts: Sequence[str], oracle: Sequence[str], answers: Sequence[str]) -> Scored:
    """Score `texts` against the right `answers` and the `oracle`'s texts, row by row."""
    same = sum(a == b for a, b in zip(texts, oracle, strict=True)) / len(texts)
    return Scored(accuracy(texts, answers), accuracy(oracle, answers), best_constant(answers), same)


def parity(rows: Mapping[str, Scored]) -> float:
    """Accuracy fused / accuracy of the oracle over the types that count. Raises InputError where none does."""
    counted = [row for row in rows.values() if row.counts]
    if not counted:
        raise InputError("no question type on which the text oracle beats the best constant answer by 20 points")
    return sum(row.fused for row in counted) / sum(row.oracle for row in counted)
