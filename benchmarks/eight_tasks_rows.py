"""The rows of `eight_tasks.py`: how each gets from base and experts to one answer a task.

A row is a function of a `Setting` that returns a `Result`; `@row(name, kind)` adds it. It may choose coefficients by
the tasks' validation split (`tuned` does), and reads the test split once, for what it reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

from eight_tasks_data import Setting, State, accuracies, stored
from model_fusion.merge.methods import get, merge_state_dicts

Make = Callable[..., State]
"""Coefficients in, one merged state out."""


@dataclass(frozen=True)
class Result:
    """test: accuracy on each task's test split; validation: the mean by which `chosen` was chosen, if anything was;
    stored: bytes kept to serve all tasks (the frozen heads, which all rows need, are not counted); notes: other
    numbers worth a column (a router's accuracy)."""

    test: list[float]
    stored: int
    chosen: dict[str, Any] = field(default_factory=dict)
    validation: float | None = None
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """kind: reference, data-free, data-based, or dynamic (more than one network's worth runs or is stored)."""

    name: str
    kind: str
    run: Callable[[Setting], Result]


ROWS: dict[str, Row] = {}


def row(name: str, kind: str) -> Callable[[Callable[[Setting], Result]], Callable[[Setting], Result]]:
    """Registers a row under its name."""

    def add(run: Callable[[Setting], Result]) -> Callable[[Setting], Result]:
        if name in ROWS:
            raise ValueError(f"row {name} is registered twice")
        ROWS[name] = Row(name, kind, run)
        return run

    return add


def tuned(setting: Setting, candidates: Iterable[dict[str, Any]], make: Make) -> Result:
    """The candidate that is best on validation (the first of equals), its test accuracies and bytes."""
    best: tuple[float, dict[str, Any], State] | None = None
    for values in candidates:
        state = make(**values)
        mean = fmean(accuracies(setting, state, "validation"))
        if best is None or mean > best[0]:
            best = (mean, values, state)
    if best is None:
        raise ValueError("no candidates")
    mean, values, state = best
    return Result(accuracies(setting, state, "test"), stored(state), values, mean)


def grid(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the axes' values."""
    combined: list[dict[str, Any]] = [{}]
    for name, values in axes.items():
        combined = [{**one, name: value} for one in combined for value in values]
    return combined


@row("base", "reference")
def _base(setting: Setting) -> Result:
    return Result(accuracies(setting, setting.base, "test"), stored(setting.base))


@row("experts", "reference")
def _experts(setting: Setting) -> Result:
    own = [accuracies(setting, expert, "test")[i] for i, expert in enumerate(setting.experts)]
    return Result(own, sum(stored(expert) for expert in setting.experts))


def static(method: str, candidates: list[dict[str, Any]], based: bool = True, label: str = "") -> None:
    """A row for one method of the registry, tuned over the candidates (parameters of method and models together)."""

    per_model = [one.name for one in fields(get(method).model_params)]

    @row(label or method, "data-free")
    def run(setting: Setting) -> Result:
        def make(**values: Any) -> State:
            each = {name: value for name, value in values.items() if name in per_model}
            own = {name: value for name, value in values.items() if name not in per_model}
            base = setting.base if based else None
            return merge_state_dicts(
                method, setting.experts, base, [each] * len(setting.experts), seed=setting.seed, **own
            )

        return tuned(setting, candidates, make)


SCALES = [0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0]
"""Factors on a sum of task vectors."""
DENSITIES = [0.1, 0.2, 0.5, 0.8]
AROUND_ONE = [0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.3, 1.6, 2.0]
"""Factors on a mean, or on a sum that a method has tamed."""

CUTS: dict[str, Sequence[Any]] = {"density": DENSITIES, "lambda_": SCALES}

static("linear", [{}], based=False)
static("multislerp", [{}], based=False)
static("karcher", [{}], based=False)
static("model_stock", [{}])
static("task_arithmetic", grid(lambda_=SCALES))
static("lines", grid(alpha=[0.0, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2], beta=[0.0, 0.03, 0.05, 0.1, 0.2, 0.3]))
AGREED = [0.1, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0]
static("consensus", grid(strength=[0.05, 0.1, 0.2, 0.4, 0.6, 1.0], lambda_=AGREED))
static("ties", grid(density=DENSITIES, lambda_=AROUND_ONE))
static("breadcrumbs", grid(**CUTS))
static("breadcrumbs_ties", grid(**CUTS))
static("dare_linear", grid(**CUTS))
static("dare_ties", grid(**CUTS))
static("della", grid(density=[0.2, 0.5, 0.8], epsilon=[0.15], lambda_=AROUND_ONE))
static("della_linear", grid(density=[0.2, 0.5, 0.8], epsilon=[0.15], lambda_=SCALES))
static("sce", grid(select_topk=[0.1, 0.2, 0.5, 1.0]))
static("ram", grid(epsilon=[1e-5, 1e-4, 1e-3, 1e-2]))
static("ramplus_tl", grid(epsilon=[1e-5, 1e-4, 1e-3, 1e-2], r=[0.1, 0.5]))
static("tsv_m", grid(rank_fraction=[None, 0.25], lambda_=AROUND_ONE))
static("tsv_m", grid(rank_fraction=[None, 0.25], svd=["randomized"], lambda_=AROUND_ONE), label="tsv_m randomized")
static("iso_c", grid(lambda_=AROUND_ONE))
static("iso_cts", grid(common_space_fraction=[0.8, 0.9], lambda_=AROUND_ONE))
static("wudi", grid(time=[1.0, 3.0, 10.0, 30.0, 100.0, 1000.0], lambda_=[0.1, 0.2, 0.3, 0.5, 0.7, 1.0]))
# slerp, nuslerp, arcee_fusion, nearswap and passthrough take one or two models, so they have no row
