"""Experts of another opinion that fit the same bridge, for control 12: put in at inference, nothing retrained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from model_fusion.errors import InputError
from model_fusion.fuse.experts.base import ClassDecision, Expert, ValueDecision

SURE = 3.0
"""A rule's logit for the class it names, against 0 for the others: decisive, yet inside a trained expert's range."""


def permuted(expert: Expert, order: Sequence[int]) -> Expert:
    """The same classifier with its outputs exchanged: class i's log-probability is that of class order[i]."""
    decision = _classes(expert)
    if sorted(order) != list(range(len(decision))):
        raise InputError(f"order must name each of {len(decision)} classes once, got {list(order)}")

    def log_probs(items: list[Any]) -> Any:
        found = expert.decide(items)
        assert isinstance(found, ClassDecision)
        return found.log_probs[:, list(order)]

    return Expert.from_callable(log_probs, expert.inputs, output="logits", classes=decision)


def mirrored(expert: Expert, low: float, high: float) -> Expert:
    """The same regressor with its values turned over: `low` where it said `high`, and the other way round."""

    def values(items: list[Any]) -> Any:
        found = expert.decide(items)
        assert isinstance(found, ValueDecision)
        return low + high - found.value

    return Expert.from_callable(values, expert.inputs, output="value")


def rule(expert: Expert, choose: Callable[[Any], str]) -> Expert:
    """A rule with the expert's classes: choose(item) names one."""
    classes = _classes(expert)

    def logits(items: list[Any]) -> Any:
        out = np.zeros((len(items), len(classes)), dtype=np.float32)
        for row, item in enumerate(items):
            out[row, classes.index(choose(item))] = SURE
        return out

    return Expert.from_callable(logits, expert.inputs, output="logits", classes=classes)


def _classes(expert: Expert) -> tuple[str, ...]:
    classes = getattr(expert, "classes", None)
    if classes is None:
        raise InputError("only a classifier's outputs can be exchanged; this expert gives a value")
    return tuple(classes)
