"""model_stock: the mean moved towards the base by the models' angle (Jang et al. 2024, equation 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, register
from model_fusion.merge.methods.blocks import delta, dot, parts, total


@dataclass(frozen=True)
class ModelStockParams:
    """filter_wise: one angle for each row instead of one for the tensor."""

    filter_wise: bool = False


def _ratio(cosines: Sequence[Tensor], models: int) -> Tensor:
    """t = N·c ÷ (1 + (N − 1)·c), c the mean pairwise cosine; not clamped."""
    c = torch.stack(list(cosines)).mean(dim=0)
    return models * c / (1.0 + (models - 1) * c)


def _gram_cosines(deltas: list[Tensor]) -> list[Tensor]:
    """Pairwise cosines of float64 sums over the last dimension."""
    norms = [d.double().square().sum(-1).sqrt() for d in deltas]
    out = []
    for i, j in combinations(range(len(deltas)), 2):
        scale = norms[i] * norms[j]
        dot = (deltas[i].double() * deltas[j].double()).sum(-1)
        out.append(torch.where(scale > 0, dot / scale.clamp_min(1e-300), 0.0).clamp(-1.0, 1.0))
    return out


def _stock_ratio(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: ModelStockParams,
    key: Key,
) -> Tensor:
    """float64 [1] or, filter-wise, [N]: t for each element's place."""
    assert base is not None
    if params.filter_wise and base.dim() > 1:
        columns = base.shape[-1]
        rows_base = base.reshape(-1, columns)
        rows = [m.reshape(-1, columns) for m in models]
        found = [
            _ratio(_gram_cosines([delta(m[r : r + 1], rows_base[r : r + 1]) for m in rows]), len(models))
            for r in range(rows_base.shape[0])
        ]
        return torch.cat(found).repeat_interleave(columns)
    flat = [m.reshape(-1) for m in models]
    flat_base = base.reshape(-1)
    n = len(models)
    pairs = list(combinations(range(n), 2))
    squares = [0.0] * n
    dots = [0.0] * len(pairs)
    for part in parts(flat_base.numel()):
        deltas = [delta(m[part], flat_base[part]) for m in flat]
        for p, (i, j) in enumerate(pairs):
            dots[p] += dot(deltas[i], deltas[j])
        for i, task in enumerate(deltas):
            squares[i] += total(task.square_())
    cosines = []
    for value, (i, j) in zip(dots, pairs, strict=True):
        scale = math.sqrt(squares[i] * squares[j])
        cosine = max(-1.0, min(1.0, value / scale)) if scale > 0 else 0.0
        cosines.append(torch.tensor([cosine], dtype=torch.float64, device=base.device))
    return _ratio(cosines, n)


def _stock(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: ModelStockParams,
    key: Key,
    state: Tensor,
    start: int,
) -> Tensor:
    """t·mean(θ) + (1 − t)·base, as base + t·mean(δ)."""
    assert base is not None
    wide = base.float()
    out = delta(models[0], wide)
    for model in models[1:]:
        out += delta(model, wide)
    t = state if state.numel() == 1 else state[start : start + out.numel()]
    return out.mul_((t / len(models)).float()).add_(wide)


register(
    Method(
        "model_stock",
        Sees.TWO_PASS,
        ModelStockParams,
        NoParams,
        "required",
        min_models=2,
        statistics=_stock_ratio,
        chunk=_stock,
    )
)
