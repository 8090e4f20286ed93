"""What a finished search says: the winner, plain task arithmetic beside it, and one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from model_fusion.errors import InputError
from model_fusion.recipe.merge import MergeRecipe
from model_fusion.recipe.ranges import Free
from model_fusion.search.study import Trial


@dataclass(frozen=True)
class Candidate:
    """A recipe and its score on validation. `kind`: search or task_arithmetic."""

    kind: str
    values: dict[str, Any]
    recipe: MergeRecipe
    score: float


def winner(searched: Candidate | None, plain: Candidate | None, sign: int, failure: str | None) -> Candidate:
    """The better on validation; of equals plain task arithmetic, which is simpler. Raises InputError for none."""
    found = [candidate for candidate in (plain, searched) if candidate is not None]
    if not found:
        raise InputError(f"no candidate has a score; the first failed with: {failure}")
    return min(found, key=lambda candidate: sign * candidate.score)


def report(
    settings: Mapping[str, Any],
    space: Mapping[str, Free],
    trials: Sequence[Trial],
    plain: Sequence[Mapping[str, Any]],
    why_not: str,
    best: Candidate,
    best_plain: Candidate | None,
    scores: Mapping[str, float],
    reads: int,
) -> dict[str, Any]:
    """Everything, as JSON. No times in it: runs repeat."""
    sign = 1 if settings["direction"] == "minimize" else -1
    test: dict[str, Any] = {"reads": reads, "re_read": reads > 1, **scores}
    if "task_arithmetic" in scores:
        test["gain"] = sign * (scores["task_arithmetic"] - scores["winner"])
    return {
        "format": 1,
        "settings": dict(settings),
        "space": {name: asdict(free) for name, free in space.items()},
        "trials": [asdict(trial) for trial in trials],
        "task_arithmetic": {
            "grid": list(plain),
            "best": None if best_plain is None else {**best_plain.values, "score": best_plain.score},
            "not_defined": why_not or None,
        },
        "winner": {"kind": best.kind, "values": best.values, "score": best.score},
        "test": test,
        "sentence": sentence(settings["metric"], best, test, why_not),
    }


def sentence(metric: str, best: Candidate, test: Mapping[str, Any], why_not: str) -> str:
    """What the test set says, and how often it was asked."""
    asked = "read once" if not test["re_read"] else f"RE-READ: this test set has now been read {test['reads']} times"
    tail = f"({metric} {test['winner']:.5g}; one test set, {asked}, no interval)"
    if "gain" not in test:
        return f"Plain task arithmetic is not defined here ({why_not}); the best of the search on test {tail}."
    if best.kind == "task_arithmetic":
        return f"No trial beat plain task arithmetic on validation, so that is the result {tail}."
    verb = "gains" if test["gain"] >= 0 else "loses"
    return f"The search {verb} {abs(test['gain']):.4g} {metric} over plain task arithmetic on test {tail}."
