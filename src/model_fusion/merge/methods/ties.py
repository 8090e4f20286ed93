"""ties and the breadcrumbs: task vectors trimmed by magnitude.

TIES: Yadav et al. 2023. Model breadcrumbs: Davari and Belilovsky 2023 (the largest outliers go as well).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, Sees, check_unit, register
from model_fusion.merge.methods.blocks import delta, delta_blocks, sizes
from model_fusion.merge.methods.selection import Cut, cuts
from model_fusion.merge.methods.task_arithmetic import TaskArithmeticParams, add_elected, add_weighted


@dataclass(frozen=True)
class Trimmed:
    """weight: this model's share; density: share of its task vector to keep, by magnitude."""

    weight: float = 1.0
    density: float = 1.0

    def __post_init__(self) -> None:
        check_unit("density", self.density)


@dataclass(frozen=True)
class TiesParams:
    """normalize: divide by the agreeing weights; lambda_: factor on the merged task vector.

    trim: "tensor" keeps a share of each tensor, "global" (the paper) of the whole model.
    sign_before_weight: elect signs from the unweighted task vectors (the paper).
    int8_mask: accepted, changes nothing.
    """

    normalize: bool = True
    lambda_: float = 1.0
    trim: Literal["tensor", "global"] = "tensor"
    sign_before_weight: bool = False
    int8_mask: bool = False

    def __post_init__(self) -> None:
        if self.trim not in ("tensor", "global"):
            raise InputError(f"trim must be 'tensor' or 'global', got {self.trim!r}")


def kept(density: float, numel: int) -> int:
    """How many elements a density keeps: max(1, int(d·N))."""
    return max(1, int(density * numel))


def _ties_cuts(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Trimmed],
    params: TiesParams,
    key: Key,
) -> list[Cut]:
    if params.trim == "global":
        if key.cuts is None:
            raise InputError("ties: trim: global needs all tensors of a model; merge whole models, not one tensor")
        return list(key.cuts)
    n = models[0].numel()
    return [
        cuts(delta_blocks(m, base), sizes(n), [kept(p.density, n)])[0]
        for m, p in zip(models, model_params, strict=True)
    ]


def _ties(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Trimmed],
    params: TiesParams,
    key: Key,
    state: list[Cut],
    start: int,
) -> Tensor:
    assert base is not None
    wide = base.float()
    deltas = [cut.drop_small_(delta(m, wide), start) for m, cut in zip(models, state, strict=True)]
    weights = [p.weight for p in model_params]
    before = params.sign_before_weight
    return add_elected(deltas, weights, wide, params.lambda_, params.normalize, before, "ties")


register(Method("ties", Sees.TWO_PASS, TiesParams, Trimmed, "required", statistics=_ties_cuts, chunk=_ties))


@dataclass(frozen=True)
class Crumbs(Trimmed):
    """gamma: share of the largest elements to drop before `density` of them is kept."""

    density: float = 1.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit("gamma", self.gamma)


def crumb_counts(density: float, gamma: float, numel: int) -> tuple[int, int]:
    """(dropped from the top, dropped plus kept); the density wins where both do not fit."""
    keep = int(density * numel)
    drop = min(int(gamma * numel), numel - keep)
    return drop, drop + keep


def _crumb_cuts(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Crumbs],
    params: TaskArithmeticParams,
    key: Key,
) -> list[list[Cut]]:
    n = models[0].numel()
    return [
        cuts(delta_blocks(m, base), sizes(n), list(crumb_counts(p.density, p.gamma, n)))
        for m, p in zip(models, model_params, strict=True)
    ]


def _breadcrumbs(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Crumbs],
    params: TaskArithmeticParams,
    key: Key,
    state: list[list[Cut]],
    start: int,
    *,
    elect: bool,
) -> Tensor:
    assert base is not None
    wide = base.float()
    deltas = []
    for model, (top, both) in zip(models, state, strict=True):
        task = both.drop_small_(delta(model, wide), start)
        # x − x is exactly 0, so subtracting the outliers removes them and nothing else
        deltas.append(task if top.last < 0 else task.sub_(top.drop_small_(task.clone(), start)))
    weights = [p.weight for p in model_params]
    if elect:
        return add_elected(deltas, weights, wide, params.lambda_, params.normalize, False, "breadcrumbs_ties")
    return add_weighted(deltas, weights, wide, params.lambda_, params.normalize, "breadcrumbs")


for _name, _elect in (("breadcrumbs", False), ("breadcrumbs_ties", True)):
    register(
        Method(
            _name,
            Sees.TWO_PASS,
            TaskArithmeticParams,
            Crumbs,
            "required",
            statistics=_crumb_cuts,
            chunk=partial(_breadcrumbs, elect=_elect),
        )
    )
