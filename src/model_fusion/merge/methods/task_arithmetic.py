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
    votes = deltas[0].clone()
    for task in deltas[1:]:
        votes += task
    # ±1, + where the vote is 0; adding 0.0 turns −0 into +0
    sign = torch.copysign(torch.ones((), device=votes.device), votes.add_(0.0))
    merged = torch.zeros_like(votes)
    share = torch.zeros_like(votes) if normalize else None
    for task, weight in zip(deltas, weights, strict=True):
        task.mul_(sign).clamp_min_(0.0)
        if share is not None:
            share += task.sign().mul_(weight)
        merged += task.mul_(weight) if sign_before_weight else task
    if share is not None:
        merged /= share.masked_fill_(share == 0, 1.0)
    return _finish(merged.mul_(sign), base, lambda_)


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
