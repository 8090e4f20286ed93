"""arcee_fusion: keep the changes whose importance is an outlier (Arcee's dynamic threshold fusion).

Importance = |δ| × the row's divergence KL(softmax θ ‖ softmax base); an element is kept at or above
median + 1.5·(third − first quartile).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, register


def row_divergence(model: Tensor, base: Tensor) -> Tensor:
    """float64 [..., 1]: KL(softmax(model) ‖ softmax(base)) along the last dimension."""
    p, q = model.double().log_softmax(-1), base.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1, keepdim=True)


def _quartiles(values: Tensor) -> tuple[float, float, float]:
    """The three quartiles, linearly interpolated."""
    found = np.quantile(values.cpu().numpy(), [0.25, 0.5, 0.75])
    return float(found[0]), float(found[1]), float(found[2])


def _fusion(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: NoParams,
    key: Key,
) -> Tensor:
    assert base is not None
    change = models[0] - base
    importance = change.abs().double() * row_divergence(models[0], base)
    first, median, third = _quartiles(importance.reshape(-1))
    change.masked_fill_(importance < median + 1.5 * (third - first), 0.0)
    return change.add_(base)


register(Method("arcee_fusion", Sees.WHOLE_TENSOR, NoParams, NoParams, "required", 1, 1, whole=_fusion))
