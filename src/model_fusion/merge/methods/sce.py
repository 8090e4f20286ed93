"""sce: select by variance, calculate weights from energy, erase minority signs (Wan et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, check_unit, register
from model_fusion.merge.methods.blocks import BLOCK, delta, parts, sizes, total
from model_fusion.merge.methods.selection import KEEP_ALL, Cut, cuts


@dataclass(frozen=True)
class SceParams:
    """select_topk: share of the elements with non-zero variance to keep."""

    select_topk: float = 1.0
    int8_mask: bool = False

    def __post_init__(self) -> None:
        check_unit("select_topk", self.select_topk)


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """Population variance across models, element by element."""
    n = len(deltas)
    mean = deltas[0].clone()
    for task in deltas[1:]:
        mean += task
    mean /= n
    out = torch.zeros_like(mean)
    for task in deltas:
        out += (task - mean).square_()
    return out.div_(n)


def _outside(deltas: Sequence[Tensor], cut: Cut, start: int) -> Tensor:
    """bool: where the variance is not selected."""
    return cut.drop_small_(_variance(deltas), start) == 0


def _select(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: SceParams,
    key: Key,
) -> tuple[Cut | None, list[float]]:
    """The variance's cut (None: everything) and each model's weight."""
    assert base is not None
    flat, flat_base = [m.reshape(-1) for m in models], base.reshape(-1)
    n = flat_base.numel()

    def deltas(part: slice) -> list[Tensor]:
        return [delta(m[part], flat_base[part]) for m in flat]

    def variance(i: int) -> Tensor:
        return _variance(deltas(slice(i * BLOCK, (i + 1) * BLOCK)))

    cut: Cut | None = None
    if params.select_topk < 1.0:
        nonzero = sum(int(torch.count_nonzero(variance(i))) for i in range(len(sizes(n))))
        cut = cuts(variance, sizes(n), [int(nonzero * params.select_topk)])[0]
    energy = [0.0] * len(models)
    for part in parts(n):
        tasks = deltas(part)
        outside = None if cut is None or cut == KEEP_ALL else _outside(tasks, cut, part.start)
        for i, task in enumerate(tasks):
            if outside is not None:
                task.masked_fill_(outside, 0.0)
            energy[i] += total(task.square_())
    means = [e / n for e in energy]
    whole = sum(means)
    if whole < 1e-6:
        return cut, [1.0 / len(models)] * len(models)
    return cut, [m / whole for m in means]


def _sce(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: SceParams,
    key: Key,
    state: tuple[Cut | None, list[float]],
    start: int,
) -> Tensor:
    """base + Σ(wδm) ÷ max(Σ(wm), 1e-6), m: δ's sign is the sum's."""
    assert base is not None
    cut, weights = state
    wide = base.float()
    tasks = [delta(m, wide) for m in models]
    if cut is not None:
        outside = _outside(tasks, cut, start)
        for task in tasks:
            task.masked_fill_(outside, 0.0)
    votes = tasks[0].clone()
    for task in tasks[1:]:
        votes += task
    sign = torch.copysign(torch.ones((), device=votes.device), votes.add_(0.0))
    merged, share = torch.zeros_like(votes), torch.zeros_like(votes)
    for task, weight in zip(tasks, weights, strict=True):
        task.mul_(sign).clamp_min_(0.0)
        share += task.sign().mul_(weight)
        merged += task.mul_(weight)
    return merged.div_(share.clamp_min_(1e-6)).mul_(sign).add_(wide)


register(Method("sce", Sees.TWO_PASS, SceParams, NoParams, "required", statistics=_select, chunk=_sce))
