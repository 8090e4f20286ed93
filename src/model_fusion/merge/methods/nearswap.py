"""nearswap: move towards the second model, by at most t an element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, register
from model_fusion.merge.methods.blocks import delta


@dataclass(frozen=True)
class NearswapParams:
    """t: the largest step an element may make."""

    t: float

    def __post_init__(self) -> None:
        if self.t < 0:
            raise InputError(f"nearswap: t must not be negative, got {self.t:g}")


def _nearswap(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: NearswapParams,
    key: Key,
    state: object,
    start: int,
) -> Tensor:
    """base + δ·min(1, t ÷ |δ|), which is δ clamped to ±t."""
    assert base is not None
    wide = base.float()
    return delta(models[0], wide).clamp_(-params.t, params.t).add_(wide)


register(Method("nearswap", Sees.ELEMENTWISE, NearswapParams, NoParams, "required", 1, 1, chunk=_nearswap))
