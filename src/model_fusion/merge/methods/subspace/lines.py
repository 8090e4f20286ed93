"""lines: task arithmetic that grows with depth (LiNeS: Wang et al. 2024, arXiv 2410.17146, equation 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, Sees, register
from model_fusion.merge.methods.blocks import delta
from model_fusion.merge.methods.linear import Weighted
from model_fusion.merge.methods.task_arithmetic import add_weighted


@dataclass(frozen=True)
class LinesParams:
    """alpha: factor at the first layer, and on what lies before the layers (None: 1 / number of models, the paper's
    value for merging); beta: what is added to it until the last layer, and for what lies after the layers.

    The published code gives α to everything outside the layers; here the final norm and the head get α + β, as the
    last layer does.
    """

    alpha: float | None = None
    beta: float = 0.5


def _lines(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Weighted],
    params: LinesParams,
    key: Key,
    state: object,
    start: int,
) -> Tensor:
    """base + (α + β·depth) Σ wδ."""
    assert base is not None
    if key.depth is None:
        raise InputError(f"lines needs to know how deep {key.name!r} lies: give depth={{name: 0 … 1}}")
    wide = base.float()
    alpha = 1 / len(models) if params.alpha is None else params.alpha
    deltas = [delta(m, wide) for m in models]
    return add_weighted(deltas, [p.weight for p in model_params], wide, alpha + params.beta * key.depth, False, "lines")


register(Method("lines", Sees.ELEMENTWISE, LinesParams, Weighted, "required", chunk=_lines))
