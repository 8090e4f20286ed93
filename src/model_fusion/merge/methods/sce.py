"""sce: select by variance, calculate weights from energy, erase minority signs (Wan et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, check_unit, register
from model_fusion.merge.methods.blocks import BLOCK, delta, parts, sizes, total
from model_fusion.merge.methods.selection import Cut, cuts
from model_fusion.merge.methods.task_arithmetic import agreeing_, elected_sign, flip_


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
    if n == 2:
        return (deltas[0] - deltas[1]).mul_(0.5).square_()
    mean = deltas[0].clone()
    for task in deltas[1:]:
        mean += task
    mean /= n
    out = torch.zeros_like(mean)
    for task in deltas:
        out += (task - mean).square_()
    return out.div_(n)


def _selected(deltas: Sequence[Tensor], cut: Cut, start: int) -> Tensor:
    """int32: −1 (all bits set) where the variance is selected, else 0."""
    left = cut.drop_small_(_variance(deltas), start).view(torch.int32)
    # a value above zero has a negated pattern below zero
    return left.neg_().bitwise_right_shift_(31)


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

    def variance(i: int, step: int) -> Tensor:
        return _variance(deltas(slice(i * BLOCK, (i + 1) * BLOCK, step)))

    cut: Cut | None = None
    if params.select_topk < 1.0:
        cut = cuts(variance, sizes(n), [float(params.select_topk)])[0]
    energy = [0.0] * len(models)
    for part in parts(n):
        tasks = deltas(part)
        selected = None if cut is None else _selected(tasks, cut, part.start)
        for i, task in enumerate(tasks):
            if selected is not None:
                task.view(torch.int32).bitwise_and_(selected)
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
        selected = _selected(tasks, cut, start)
        for task in tasks:
            task.view(torch.int32).bitwise_and_(selected)
    sign = elected_sign(tasks)
    merged, share = torch.zeros_like(wide), torch.zeros_like(wide)
    for task, weight in zip(tasks, weights, strict=True):
        agreeing_(task, sign)
        share += task.sign().mul_(weight)
        merged += task.mul_(weight)
    return flip_(merged.div_(share.clamp_min_(1e-6)), sign).add_(wide)


register(Method("sce", Sees.TWO_PASS, SceParams, NoParams, "required", statistics=_select, chunk=_sce))
