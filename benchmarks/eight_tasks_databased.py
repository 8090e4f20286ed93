"""Rows of `eight_tasks.py` that see data: Fisher, RegMean, RegMean++, AdaMerging.

Samples are the first images of a task's training split, without their labels: Fisher draws labels from the expert's
own answers, and AdaMerging only lowers the entropy of the merged network's. Coefficients are chosen on validation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from eight_tasks_data import Setting, State, network
from eight_tasks_rows import Result, grid, row, tuned
from model_fusion.merge.calibration import adamerging, collect_merged_statistics, collect_statistics
from model_fusion.merge.methods import merge_state_dicts

ALPHAS = [0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0]
FISHER_SAMPLES = 256
ADA_SAMPLES, ADA_BATCH = 256, 64
STARTS, STEPS = [0.05, 0.1, 0.3], [30, 100, 300]
"""Of AdaMerging's λ, and how far they go. Its entropy falls on long after accuracy does, so where to stop is chosen."""


def under(head: nn.Linear) -> Callable[[nn.Module, Any], Tensor]:
    """The network's answer under a task's head."""
    return lambda model, x: head(model(x))


def inputs(setting: Setting, samples: int) -> list[Tensor]:
    """Of each task the first training images, without labels."""
    return [task.train.x[:samples] for task in setting.tasks]


@row("fisher", "data-based")
def _fisher(setting: Setting) -> Result:
    data = inputs(setting, FISHER_SAMPLES)
    found = [
        collect_statistics(network(state), [x], "fisher", forward=under(head), seed=setting.seed)
        for state, x, head in zip(setting.experts, data, setting.heads, strict=True)
    ]

    def make(**values: Any) -> State:
        return merge_state_dicts("fisher", setting.experts, statistics=found, **values)

    return tuned(setting, grid(floor=[1e-6, 1e-4, 1e-2, 1.0]), make)


def regmean(name: str, samples: int, alphas: Sequence[float], merged: bool = False) -> None:
    """A row of RegMean on so many samples a task; `merged`: activations go through the merged network."""

    @row(name, "data-based")
    def run(setting: Setting) -> Result:
        data = [[x] for x in inputs(setting, samples)]
        networks = [network(state) for state in setting.experts]
        own = [collect_statistics(one, x) for one, x in zip(networks, data, strict=True)] if not merged else []

        def make(alpha: float) -> State:
            found = collect_merged_statistics(networks, data, alpha=alpha) if merged else own
            return merge_state_dicts("regmean", setting.experts, statistics=found, alpha=alpha)

        return tuned(setting, grid(alpha=alphas), make)


regmean("regmean 64, alpha 0.9", 64, [0.9])
for _count in (16, 64, 256):
    regmean(f"regmean {_count}", _count, ALPHAS)
regmean("regmean++ 64, alpha 0.9", 64, [0.9], merged=True)
regmean("regmean++ 64", 64, ALPHAS, merged=True)


@row("adamerging", "data-based")
def _adamerging(setting: Setting) -> Result:
    batches = [list(x.split(ADA_BATCH)) for x in inputs(setting, ADA_SAMPLES)]
    heads = [under(head) for head in setting.heads]
    entropies: dict[tuple[float, int], tuple[float, float]] = {}

    def make(initial: float, steps: int) -> State:
        found = adamerging(network(setting.base), setting.experts, batches, forward=heads, steps=steps, initial=initial)
        entropies[initial, steps] = (found.entropy[0], found.entropy[-1])
        return merge_state_dicts("task_arithmetic", setting.experts, setting.base, found.parameters())

    result = tuned(setting, grid(initial=STARTS, steps=STEPS), make)
    before, after = (
        value / len(setting.tasks) for value in entropies[result.chosen["initial"], result.chosen["steps"]]
    )
    return replace(result, notes={"entropy before": before, "entropy after": after})
