"""task_arithmetic, and the weighting and sign election that ties, dare, della and breadcrumbs share.

Task arithmetic: Ilharco et al. 2023, base + λ Σ wδ with δ = θ − base. Sign election: Yadav et al. 2023
(TIES, section 3.2), with the weights applied before the election unless `sign_before_weight` asks for
the paper's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.merge.methods.base import Key, Method, Sees, register
from model_fusion.merge.methods.blocks import delta
from model_fusion.merge.methods.linear import Weighted, weight_sum


@dataclass(frozen=True)
class TaskArithmeticParams:
    """normalize: divide by the sum of the weights; lambda_: factor on the merged task vector.

    int8_mask is accepted for recipes written for other tools and changes nothing: no mask is stored.
    """

    normalize: bool = False
    lambda_: float = 1.0
    int8_mask: bool = False


def add_weighted(
    deltas: list[Tensor], weights: Sequence[float], base: Tensor, lambda_: float, normalize: bool, method: str
) -> Tensor:
    """base + λ Σ wδ (÷ Σ w when normalised); the deltas are overwritten."""
    scale = weight_sum(weights, method) if normalize else 1.0
    out = deltas[0].mul_(weights[0])
    for task, weight in zip(deltas[1:], weights[1:], strict=True):
        out += task.mul_(weight)
    return _finish(out if scale == 1.0 else out.div_(scale), base, lambda_)


def add_elected(
    deltas: list[Tensor],
    weights: Sequence[float],
    base: Tensor,
    lambda_: float,
    normalize: bool,
    sign_before_weight: bool,
    method: str,
) -> Tensor:
    """base + λ Σ(wδm) ÷ Σ(wm), m: δ's sign is the elected one; a zero sum elects +, a zero denominator is 1.

    The deltas are overwritten.
    """
    if normalize:
        weight_sum(weights, method)
    if not sign_before_weight:
        for task, weight in zip(deltas, weights, strict=True):
            task.mul_(weight)
    sign = elected_sign(deltas)
    merged: Tensor | None = None
    share: Tensor | None = None
    for task, weight in zip(deltas, weights, strict=True):
        agreeing_(task, sign)
        if normalize:
            part = task.sign().mul_(weight)
            share = part if share is None else share.add_(part)
        if sign_before_weight:
            task.mul_(weight)
        merged = task if merged is None else merged.add_(task)
    assert merged is not None
    if share is not None:
        if min(weights) > 0:
            # a share is 0 or at least the smallest weight, and where it is 0 so is the sum
            share.clamp_min_(min(weights))
        else:
            share.masked_fill_(share == 0, 1.0)
        merged.div_(share)
    return _finish(flip_(merged, sign), base, lambda_)


def elected_sign(deltas: Sequence[Tensor]) -> Tensor:
    """int32: the sign bit of Σ δ; + where the sum is 0 (adding 0.0 turns −0 into +0)."""
    votes = deltas[0] + 0.0
    for task in deltas[1:]:
        votes += task
    return votes.add_(0.0).view(torch.int32).bitwise_and_(-(2**31))


def flip_(values: Tensor, sign: Tensor) -> Tensor:
    """Negates, in place, where the sign bit is set."""
    values.view(torch.int32).bitwise_xor_(sign)
    return values


def agreeing_(task: Tensor, sign: Tensor) -> Tensor:
    """In place: the magnitudes of the elements with the elected sign, 0 elsewhere."""
    return flip_(task, sign).clamp_min_(0.0)


def _finish(merged: Tensor, base: Tensor, lambda_: float) -> Tensor:
    if lambda_ != 1.0:
        merged.mul_(lambda_)
    return merged.add_(base.float())


def _task_arithmetic(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Weighted],
    params: TaskArithmeticParams,
    key: Key,
    state: object,
    start: int,
) -> Tensor:
    assert base is not None
    wide = base.float()
    weights = [p.weight for p in model_params]
    deltas = [delta(m, wide) for m in models]
    return add_weighted(deltas, weights, wide, params.lambda_, params.normalize, "task_arithmetic")


register(
    Method(
        "task_arithmetic",
        Sees.ELEMENTWISE,
        TaskArithmeticParams,
        Weighted,
        "required",
        chunk=_task_arithmetic,
    )
)
