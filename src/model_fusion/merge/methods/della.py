"""della and della_linear: larger elements of a row survive with higher probability (Deep et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, Sees, register
from model_fusion.merge.methods.blocks import BLOCK, delta, total
from model_fusion.merge.methods.dare import DareParams, l1_ratio
from model_fusion.merge.methods.random_masks import uniform_bits
from model_fusion.merge.methods.task_arithmetic import add_elected, add_weighted
from model_fusion.merge.methods.ties import Trimmed


@dataclass(frozen=True)
class Ranked(Trimmed):
    """epsilon: keep probabilities run from density − epsilon to density + epsilon along a row's ranks."""

    density: float = 1.0
    epsilon: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon < 0:
            raise InputError(f"epsilon must not be negative, got {self.epsilon:g}")
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if self.density < 1.0 and (low < -1e-9 or high > 1 + 1e-9):
            raise InputError(
                f"density ± epsilon must stay in [0, 1]; lower epsilon: {self.density:g} ± {self.epsilon:g}"
            )


@dataclass(frozen=True)
class DellaParams(DareParams):
    """As dare's; della divides by the agreeing weights."""

    normalize: bool = True


@dataclass(frozen=True)
class DellaLinearParams(DareParams):
    """As dare's."""


def _row_order(size: Tensor) -> Tensor:
    """int64 [R, C]: columns of each row by rising magnitude, equal ones by lowest column.

    Magnitude bits and column share one integer, so that an unstable (and fast) sort gives the stable order.
    """
    packed = size.view(torch.int32).to(torch.int64)
    packed <<= 32
    packed |= torch.arange(size.shape[1], device=size.device)
    if size.device.type == "cpu":
        packed.numpy().sort(axis=1)
    else:
        packed = packed.sort(dim=1).values
    return packed.bitwise_and_(0xFFFFFFFF)


def keep_rows(size: Tensor, density: float, epsilon: float, key: Key, model: int, start: int) -> Tensor:
    """bool [R, C]: which elements of rows of magnitudes survive; `start` is the first one's flat index."""
    rows, columns = size.shape
    if columns == 1:
        probability = np.full(1, density)
    else:
        probability = (density - epsilon) + 2 * epsilon * np.arange(columns) / (columns - 1)
    limit = np.clip(np.rint(probability * 2.0**32), 0, 2.0**32)
    order = _row_order(size)
    bits = torch.from_numpy(uniform_bits(key.seed, key.name, model, start, rows * columns).view(np.int32))
    drawn = bits.view(rows, columns).to(size.device)
    # signed arithmetic: shift both sides of "drawn < limit" by 2³¹ (a limit of 2³² keeps everything)
    shifted = torch.from_numpy(np.minimum(limit, 2.0**32 - 1) - 2.0**31).to(torch.int32).to(size.device)
    ranked = (drawn ^ -(2**31)).gather(1, order) < shifted
    ranked |= torch.from_numpy(limit >= 2.0**32).to(size.device)
    return torch.empty_like(ranked).scatter_(1, order, ranked)


def _masks(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Ranked],
    params: DareParams,
    key: Key,
) -> list[tuple[Tensor | None, float]]:
    """Each model's flat keep mask (None: everything) and rescaling factor."""
    assert base is not None
    columns = max(base.shape[-1], 1) if base.dim() else 1
    rows_base = base.reshape(-1, columns)
    step = max(1, BLOCK // columns)
    out: list[tuple[Tensor | None, float]] = []
    for i, (model, p) in enumerate(zip(models, model_params, strict=True)):
        if p.density >= 1.0 and key.masks is None:
            out.append((None, 1.0))
            continue
        rows = model.reshape(-1, columns)
        mask = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
        before = after = 0.0
        for r in range(0, rows.shape[0], step):
            size = delta(rows[r : r + step], rows_base[r : r + step]).abs_()
            if key.masks is None:
                keep = keep_rows(size, p.density, p.epsilon, key, i, r * columns)
            else:
                keep = key.masks[i].reshape(-1, columns)[r : r + step].bool()
            mask[r : r + step] = keep
            if params.mode == "l1":
                before += total(size)
                after += total(size.masked_fill_(~keep, 0.0))
        factor = 1.0 if params.mode == "none" else l1_ratio(before, after)
        if params.mode == "1/d":
            factor = 1.0 / p.density if p.density > 0 else 1.0
        out.append((mask.view(-1), factor))
    return out


def _della(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Ranked],
    params: DareParams,
    key: Key,
    state: list[tuple[Tensor | None, float]],
    start: int,
    *,
    elect: bool,
) -> Tensor:
    assert base is not None
    wide = base.float()
    deltas = []
    for model, (mask, factor) in zip(models, state, strict=True):
        task = delta(model, wide)
        if mask is not None:
            task.masked_fill_(~mask[start : start + task.numel()], 0.0)
        deltas.append(task if factor == 1.0 else task.mul_(factor))
    weights = [p.weight for p in model_params]
    if elect:
        before = params.sign_before_weight
        return add_elected(deltas, weights, wide, params.lambda_, params.normalize, before, "della")
    return add_weighted(deltas, weights, wide, params.lambda_, params.normalize, "della_linear")


for _name, _params, _elect in (("della", DellaParams, True), ("della_linear", DellaLinearParams, False)):
    register(
        Method(
            _name,
            Sees.ROW,
            _params,
            Ranked,
            "required",
            statistics=_masks,
            chunk=partial(_della, elect=_elect),
        )
    )
