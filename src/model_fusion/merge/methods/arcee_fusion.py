"""arcee_fusion: keep the changes whose importance is an outlier (Arcee's dynamic threshold fusion).

Importance = |δ| × the row's divergence KL(softmax θ ‖ softmax base); an element is kept at or above
median + 1.5·(third − first quartile). Rows of near models diverge by 1e-7 or less, so the divergence is taken in
float64 (in float32 it is rounding noise); importance is then a float32, whose quartiles are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, register
from model_fusion.merge.methods.blocks import BLOCK, delta, sizes
from model_fusion.merge.methods.selection import cuts


@dataclass(frozen=True)
class _Outliers:
    """divergence: float64 [rows]; columns: of a row; threshold: on the importance."""

    divergence: Tensor
    columns: int
    threshold: float

    def importance(self, change: Tensor, start: int, step: int = 1) -> Tensor:
        """float32: of flat changes, every step-th from flat index `start`."""
        last = start + (change.numel() - 1) * step
        first_row, last_row = start // self.columns, last // self.columns
        rows = self.divergence[first_row : last_row + 1, None].expand(-1, self.columns).reshape(-1)
        at = start - first_row * self.columns
        return (change.abs() * rows[at : at + last - start + 1 : step]).float()


def row_divergence(model: Tensor, base: Tensor) -> Tensor:
    """float64 [R]: KL(softmax(model) ‖ softmax(base)) of each row of [R, C]."""
    p, q = model.double().log_softmax(-1), base.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min_(0.0)


def _quartile_threshold(ordered: dict[int, float], n: int) -> float:
    """median + 1.5·(third − first quartile), linearly interpolated between the values at given ranks."""
    low, middle, high = (_interpolated(ordered, share * (n - 1)) for share in (0.25, 0.5, 0.75))
    return middle + 1.5 * (high - low)


def _interpolated(ordered: dict[int, float], position: float) -> float:
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    return below + (above - below) * (position - math.floor(position))


def _outliers(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: NoParams,
    key: Key,
) -> _Outliers:
    assert base is not None
    columns = max(base.shape[-1], 1) if base.dim() else 1
    rows, rows_base = models[0].reshape(-1, columns), base.reshape(-1, columns)
    step = max(1, BLOCK // columns)
    found = [row_divergence(rows[r : r + step], rows_base[r : r + step]) for r in range(0, rows.shape[0], step)]
    known = _Outliers(torch.cat(found), columns, 0.0)
    flat, flat_base, n = rows.reshape(-1), rows_base.reshape(-1), rows.numel()

    def block(i: int, every: int) -> Tensor:
        part = slice(i * BLOCK, (i + 1) * BLOCK, every)
        return known.importance(delta(flat[part], flat_base[part]), i * BLOCK, every)

    wanted = {f(share * (n - 1)) for share in (0.25, 0.5, 0.75) for f in (math.floor, math.ceil)}
    # the value of rank r from below is the (n − r)-th largest; where nothing is cut off, it is the smallest
    ranks = sorted(wanted)
    at = {r: cut.threshold for r, cut in zip(ranks, cuts(block, sizes(n), [n - r for r in ranks]), strict=True)}
    if 0 in at:
        at[0] = min(float(block(i, 1).min()) for i in range(len(sizes(n))))
    return _Outliers(known.divergence, columns, _quartile_threshold(at, n))


def _fusion(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: NoParams,
    key: Key,
    state: _Outliers,
    start: int,
) -> Tensor:
    assert base is not None
    wide = base.float()
    change = delta(models[0], wide)
    change.masked_fill_(state.importance(change, start) < state.threshold, 0.0)
    return change.add_(wide)


register(
    Method("arcee_fusion", Sees.TWO_PASS, NoParams, NoParams, "required", 1, 1, statistics=_outliers, chunk=_fusion)
)
