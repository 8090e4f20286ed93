"""della and della_linear: larger elements of a row survive with higher probability (Deep et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, Sees, register
from model_fusion.merge.methods.compiled import kernel
from model_fusion.merge.methods.dare import DareParams, draw_masks, masked_merge
from model_fusion.merge.methods.random_masks import as_mask, kept_below, uniform_bits
from model_fusion.merge.methods.ties import Trimmed

_SHIFT = 15
"""Leaves a float32's exponent and its eight leading mantissa bits: all that a difference of bf16 needs."""
_WIDTH = 1 << 11
"""Buckets a row: eight powers of two below the largest magnitude."""


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


def keep_rows(size: Tensor, p: Ranked, key: Key, model: int, start: int) -> Tensor:
    """int8 [R, C], −1 where an element survives, of rows of magnitudes; `start` is the first one's flat index.

    An element of rank r (0 for the smallest of a row, equal ones share their mean rank) survives where a
    uniform u < (density − epsilon) + 2·epsilon·r/(C − 1).
    """
    rows, columns = size.shape
    drawn = uniform_bits(key.seed, key.name, model, start, size.numel(), fill=kernel("mixed"))
    if columns == 1 or p.epsilon == 0:
        return kept_below(drawn, p.density).view(rows, columns)
    # the rank above which an element survives
    per_rank = 2.0 * p.epsilon / (columns - 1)
    limit = drawn.astype(np.float32)
    limit *= np.float32(2.0**-32 / per_rank)
    limit -= np.float32((p.density - p.epsilon) / per_rank)
    bits = size.view(torch.int32).cpu().numpy()
    return as_mask(above_rank(bits, limit.reshape(rows, columns))).to(size.device)


def above_rank(bits: NDArray[np.int32], limit: NDArray[np.float32]) -> NDArray[np.bool_]:
    """bool [R, C]: whether each element's mean rank within its row is above its limit.

    **Arguments**
    bits: int32 [R, C], not negative. limit: float32 [R, C].

    No row is sorted. A histogram of leading bits gives the ranks at which each element's bucket begins and ends.
    That settles most elements; so it does in buckets of one value, which is what differences of 16-bit models
    mostly make. Of the rest the buckets are sorted.
    """
    rows, columns = bits.shape
    if (compiled := kernel("above_rank")) is not None:
        chosen = np.empty(bits.shape, dtype=np.bool_)
        compiled(bits, limit, _SHIFT, _WIDTH, chosen)
        return chosen
    prefix = bits >> _SHIFT
    bucket = prefix - np.int32(int(prefix.max()) - _WIDTH + 1)
    np.maximum(bucket, 1, out=bucket)
    # bucket 0 is for zeros, 1 for all that is too small, the others for one prefix each
    np.minimum(bucket, bits, out=bucket)
    prefix <<= _SHIFT
    odd = prefix != bits
    odd |= bucket == 1
    bucket += np.arange(rows, dtype=np.int32)[:, None] * np.int32(_WIDTH)
    flat, asked = bucket.reshape(-1), limit.reshape(-1) + np.float32(0)  # −0 becomes +0
    sizes = torch.bincount(torch.from_numpy(flat), minlength=rows * _WIDTH).float()
    ends = sizes.view(rows, _WIDTH).cumsum(1).view(-1).numpy()
    # below 0 every element is above its limit, from C − 1 on none; as unsigned bits, negative floats are large
    open_ = np.flatnonzero(asked.view(np.uint32) < np.float32(columns - 1).view(np.uint32))
    place, asked = flat[open_], asked[open_]
    end, size = ends[place], sizes.numpy()[place]
    rank = end - 0.5 * (size + 1)
    # undecided where the limit lies within a bucket that holds values beyond its usual one
    unsure = np.flatnonzero((end - size <= asked) & (end - 1 > asked))
    if unsure.size:
        mixed = np.zeros(rows * _WIDTH, dtype=np.bool_)
        mixed[np.compress(odd.reshape(-1), flat)] = True
        unsure = unsure[mixed[place[unsure]]]
    if unsure.size:
        mixed[:] = False
        mixed[place[unsure]] = True
        start = end[unsure] - size[unsure]
        rank[unsure] = start + _rank_inside(bits.reshape(-1), flat, mixed, open_[unsure])
    keep = limit.reshape(-1) < 0
    keep[open_] = rank > asked
    return keep.reshape(rows, columns)


def _rank_inside(
    bits: NDArray[np.int32], bucket: NDArray[np.int32], wanted: NDArray[np.bool_], few: NDArray[np.int64]
) -> NDArray[np.float64]:
    """float64: mean ranks of the elements `few` inside their buckets, all of which are `wanted`."""
    members = np.flatnonzero(np.take(wanted, bucket))
    packed = (bucket[members].astype(np.int64) << 32) | bits[members]
    packed.sort()
    mine = (bucket[few].astype(np.int64) << 32) | bits[few]
    start = np.searchsorted(packed, mine & ~np.int64(0xFFFFFFFF))
    low, high = np.searchsorted(packed, mine), np.searchsorted(packed, mine, side="right")
    return np.asarray((low + high - 1) * 0.5 - start)


for _name, _params, _elect in (("della", DellaParams, True), ("della_linear", DellaLinearParams, False)):
    register(
        Method(
            _name,
            Sees.ROW,
            _params,
            Ranked,
            "required",
            statistics=partial(draw_masks, draw=keep_rows),
            chunk=partial(masked_merge, elect=_elect, method=_name),
        )
    )
