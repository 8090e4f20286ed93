"""nuslerp, multislerp and karcher: weighted means of directions, scaled by a mean length.

All their results are Σ cᵢ xᵢ with coefficients that depend on the inputs' dot products alone. So one pass
takes the dot products, the geometry is done on a few float64 numbers, and a second pass adds up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, register
from model_fusion.merge.methods.blocks import BLOCK, delta, dot, parts
from model_fusion.merge.methods.linear import Weighted, weight_sum
from model_fusion.merge.methods.slerp import arc_weights

Vector = NDArray[np.float64]


Coefficient: TypeAlias = "float | _Spread"


def gram(models: Sequence[Tensor], base: Tensor | None) -> Vector:
    """float64 [M, M]: dot products of the flattened models (of their differences from a base)."""
    out = np.zeros((len(models), len(models)))
    flat = [m.reshape(-1) for m in models]
    flat_base = None if base is None else base.reshape(-1)
    for part in parts(flat[0].numel()):
        rows = [delta(m[part], None if flat_base is None else flat_base[part]) for m in flat]
        for i, a in enumerate(rows):
            for j in range(i + 1):
                out[i, j] += dot(a, rows[j])
    return np.asarray(np.tril(out) + np.tril(out, -1).T)


def _tangent(units: Vector, point: Vector, weights: Vector) -> tuple[Vector, float]:
    """Weighted mean of the log maps at `point`, and its length, both in coefficients of the unit vectors."""
    cosine = np.clip(units @ point, -1.0, 1.0)
    theta = np.arccos(cosine)
    sine = np.sin(theta)
    stretch = weights * np.divide(theta, sine, out=np.ones_like(theta), where=sine > 1e-12)
    tangent = stretch - (stretch @ cosine) * point
    return tangent, math.sqrt(max(float(tangent @ units @ tangent), 0.0))


def _exp(point: Vector, tangent: Vector, length: float) -> Vector:
    if length == 0.0:
        return point
    return np.asarray(math.cos(length) * point + (math.sin(length) / length) * tangent)


def _combine(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[object],
    params: object,
    key: Key,
    state: Sequence[Coefficient],
    start: int,
) -> Tensor:
    """base + Σ cᵢ δᵢ (without a base Σ cᵢ θᵢ)."""
    wide = None if base is None else base.float()
    out: Tensor | None = None
    for model, c in zip(models, state, strict=True):
        term = delta(model, wide)
        term.mul_(c.at(start, term.numel()) if isinstance(c, _Spread) else c)
        out = term if out is None else out.add_(term)
    assert out is not None
    return out if wide is None else out.add_(wide)


@dataclass(frozen=True)
class NuslerpParams:
    """nuslerp_flatten: one arc for the whole tensor; else one for each slice along the last dimension or,
    with nuslerp_row_wise, along the first (mergekit's naming).
    """

    nuslerp_flatten: bool = True
    nuslerp_row_wise: bool = False


def _nuslerp_weights(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Weighted],
    params: NuslerpParams,
    key: Key,
) -> list[Coefficient]:
    weights = [p.weight for p in model_params]
    t = weights[1] / weight_sum(weights, "nuslerp")
    if params.nuslerp_flatten or models[0].dim() < 2:
        dots = gram(models, base)
        norms = math.sqrt(dots[0, 0] * dots[1, 1])
        cosine = max(-1.0, min(1.0, dots[0, 1] / norms)) if norms > 0 else 1.0
        return list(arc_weights(cosine, t, parallel=1.0 - 1e-14))
    columns = models[0].shape[-1]
    aa, ab, bb = (_dots(models, base, columns, pair, params.nuslerp_row_wise) for pair in ((0, 0), (0, 1), (1, 1)))
    lengths = (aa * bb).sqrt()
    cosines = (ab / lengths.clamp_min(1e-300)).clamp(-1.0, 1.0)
    theta = torch.acos(cosines)
    straight = (lengths == 0) | (cosines.abs() > 1.0 - 1e-14)
    sine = theta.sin().masked_fill(straight, 1.0)
    first = torch.where(straight, 1.0 - t, ((1.0 - t) * theta).sin() / sine)
    second = torch.where(straight, t, (t * theta).sin() / sine)
    return [_Spread(x.float(), columns, params.nuslerp_row_wise) for x in (first, second)]


def _dots(models: Sequence[Tensor], base: Tensor | None, columns: int, pair: tuple[int, int], across: bool) -> Tensor:
    """float64: dot products of a pair of models (of their differences), one for each row or, across, each column."""
    rows = [models[i].reshape(-1, columns) for i in pair]
    rows_base = None if base is None else base.reshape(-1, columns)
    step, found = max(1, BLOCK // columns), []
    for r in range(0, rows[0].shape[0], step):
        part = slice(r, r + step)
        a, b = (delta(x[part], None if rows_base is None else rows_base[part]).double() for x in rows)
        found.append((a * b).sum(0 if across else 1))
    return torch.stack(found).sum(0) if across else torch.cat(found)


@dataclass(frozen=True)
class _Spread:
    """A coefficient for each row (or, across, for each column) of a tensor."""

    values: Tensor
    columns: int
    across: bool

    def at(self, start: int, count: int) -> Tensor:
        """float32 [count]: the coefficients of the flat elements from `start`."""
        row = start // self.columns
        if self.across:
            repeats = (start + count - 1) // self.columns - row + 1
            return self.values.repeat(repeats)[start - row * self.columns :][:count]
        last = (start + count - 1) // self.columns + 1
        spread = self.values[row:last, None].expand(-1, self.columns).reshape(-1)
        return spread[start - row * self.columns :][:count]


@dataclass(frozen=True)
class MultislerpParams:
    """normalize_weights: divide weights by their sum; eps: lengths below it count as 0.

    log_map: refine the direction by one step of the sphere's logarithm. mergekit 0.1.5 projects where the
    logarithm would be due; projections around the mean cancel, so its result is the normalised mean.
    """

    normalize_weights: bool = True
    eps: float = 1e-8
    log_map: bool = False


def _unit(dots: Vector, eps: float) -> tuple[Vector, Vector]:
    """Norms, and the dot products of the unit vectors; tensors shorter than eps get norm 0."""
    norms = np.sqrt(np.diag(dots))
    norms = np.where(norms > eps, norms, 0.0)
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return norms, dots * inverse[:, None] * inverse[None, :]


def _multislerp_weights(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Weighted],
    params: MultislerpParams,
    key: Key,
) -> list[Coefficient]:
    """The normalised weighted mean (or the log-map mean at it), times the weighted mean norm."""
    raw = [p.weight for p in model_params]
    weights = np.array(raw) / (weight_sum(raw, "multislerp") if params.normalize_weights else 1.0)
    norms, units = _unit(gram(models, base), params.eps)
    length = math.sqrt(max(float(weights @ units @ weights), 0.0))
    if length <= params.eps:
        if not norms.any():
            return [0.0] * len(models)
        raise InputError("multislerp: the models' directions cancel, so they have no mean; change the weights")
    point = weights / length
    if params.log_map:
        tangent, size = _tangent(units, point, weights)
        point = _exp(point, tangent, size)
    return _scaled(point, norms, float(weights @ norms))


@dataclass(frozen=True)
class KarcherParams:
    """max_iter: most steps; tol: a step shorter than it ends the search."""

    max_iter: int = 10
    tol: float = 1e-5


def _karcher_weights(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: KarcherParams,
    key: Key,
) -> list[Coefficient]:
    """Riemannian mean of the non-zero unit tensors, times the mean norm of all non-zero tensors."""
    norms, units = _unit(gram(models, base), 0.0)
    present = norms > 0
    if not present.any():
        return [0.0] * len(models)
    weights = present / present.sum()
    length = math.sqrt(max(float(weights @ units @ weights), 0.0))
    # opposite directions have no mean direction: start from the first tensor's
    point = weights / length if length > 1e-12 else np.eye(len(models))[int(np.argmax(present))]
    for _ in range(params.max_iter):
        tangent, size = _tangent(units, point, weights)
        if size < params.tol:
            break
        point = _exp(point, tangent, size)
        point = point / math.sqrt(float(point @ units @ point))
    return _scaled(point, norms, float(weights @ norms))


def _scaled(point: Vector, norms: Vector, length: float) -> list[Coefficient]:
    """Coefficients of the inputs from those of the unit vectors."""
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return [float(c) for c in point * inverse * length]


register(
    Method(
        "nuslerp",
        Sees.TWO_PASS,
        NuslerpParams,
        Weighted,
        "optional",
        2,
        2,
        statistics=_nuslerp_weights,
        chunk=_combine,
    )
)
register(
    Method(
        "multislerp",
        Sees.TWO_PASS,
        MultislerpParams,
        Weighted,
        "optional",
        2,
        statistics=_multislerp_weights,
        chunk=_combine,
    )
)
register(
    Method(
        "karcher",
        Sees.TWO_PASS,
        KarcherParams,
        NoParams,
        "forbidden",
        2,
        statistics=_karcher_weights,
        chunk=_combine,
    )
)
