"""slerp: the arc between two tensors, each flattened as one vector (Shoemake 1985)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, check_unit, register
from model_fusion.merge.methods.blocks import dot, parts

PARALLEL = 0.9995
"""Above this |cosine| the arc is replaced by the straight line."""


@dataclass(frozen=True)
class SlerpParams:
    """t: 0 gives the base, 1 the other model."""

    t: float = 0.5

    def __post_init__(self) -> None:
        check_unit("t", self.t)


def arc_weights(cosine: float, t: float, parallel: float = PARALLEL) -> tuple[float, float]:
    """The two factors of slerp: sin((1−t)θ)/sin θ and sin(tθ)/sin θ."""
    if abs(cosine) > parallel:
        return 1.0 - t, t
    theta = math.acos(cosine)
    return math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def _pair(models: Sequence[Tensor], base: Tensor | None) -> tuple[Tensor, Tensor]:
    if base is not None and len(models) == 1:
        return base, models[0]
    if base is None and len(models) == 2:
        return models[0], models[1]
    raise InputError("slerp joins two models: give the base and one other, or two models without a base")


def _cosine(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: SlerpParams,
    key: Key,
) -> tuple[float, float]:
    """The factors from the cosine of the two whole tensors; a zero tensor counts as parallel."""
    flat_a, flat_b = (x.reshape(-1) for x in _pair(models, base))
    aa = ab = bb = 0.0
    for part in parts(flat_a.numel()):
        a, b = flat_a[part].float(), flat_b[part].float()
        aa, ab, bb = aa + dot(a, a), ab + dot(a, b), bb + dot(b, b)
    norms = math.sqrt(aa * bb)
    return arc_weights(max(-1.0, min(1.0, ab / norms)) if norms > 0 else 1.0, params.t)


def _slerp(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: SlerpParams,
    key: Key,
    state: tuple[float, float],
    start: int,
) -> Tensor:
    a, b = _pair(models, base)
    out = a.to(torch.float32, copy=True).mul_(state[0])
    return out.add_(b.to(torch.float32, copy=True).mul_(state[1]))


register(Method("slerp", Sees.TWO_PASS, SlerpParams, NoParams, "optional", 1, 2, statistics=_cosine, chunk=_slerp))
