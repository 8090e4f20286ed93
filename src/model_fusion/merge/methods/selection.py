"""The exact k largest magnitudes of a tensor without a sort, ties broken by the lowest flat index.

A non-negative float32 orders like its bit pattern. One pass counts the leading 16 of its 31 bits, a
second looks only inside the bucket that holds the k-th largest: the answer is exact. The values arrive
in blocks, so they (differences of two models, say) need never exist as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_LOW = 15
_BUCKETS = 1 << 16

Blocks = Callable[[int], Tensor]
"""Block number → float32 values; they may be overwritten."""


@dataclass(frozen=True)
class Cut:
    """Keeps magnitudes above `threshold`, and those equal to it at flat indices up to `last`."""

    threshold: float
    last: int

    def drop_small_(self, values: Tensor, start: int) -> Tensor:
        """Zeroes, in place, what is not kept of flat float32 `values` that begin at flat index `start`."""
        split = min(max(self.last + 1 - start, 0), values.numel())
        if split and self.threshold > 0:
            # Magnitudes ≥ t are those above the float just below t.
            t = torch.tensor(self.threshold, dtype=torch.float32)
            below = float(torch.nextafter(t, torch.tensor(0.0)))
            _shrink_(values[:split], below)
        if split < values.numel():
            _shrink_(values[split:], self.threshold)
        return values


KEEP_ALL = Cut(0.0, 1 << 62)
KEEP_NONE = Cut(float("inf"), -1)


def _shrink_(values: Tensor, limit: float) -> None:
    torch.ops.aten.hardshrink.out(values, limit, out=values)


def _bits(block: Tensor) -> Tensor:
    return block.abs_().view(torch.int32)


def cuts(blocks: Blocks, sizes: list[int], ks: list[int]) -> list[Cut]:
    """For each k the cut that keeps exactly the k largest magnitudes, ties by lowest flat index.

    **Arguments**
    blocks, sizes: the values, block by block, and the blocks' lengths.
    ks: numbers to keep, from 0 to all.

    **Returns** one Cut a k, with flat indices counted over all blocks.
    """
    total = sum(sizes)
    out: list[Cut | None] = [KEEP_NONE if k <= 0 else KEEP_ALL if k >= total else None for k in ks]
    if all(cut is not None for cut in out):
        return [cut for cut in out if cut is not None]
    histogram = torch.zeros(_BUCKETS, dtype=torch.int64)
    for i in range(len(sizes)):
        histogram += torch.bincount(_bits(blocks(i)) >> _LOW, minlength=_BUCKETS).cpu()
    # above[b]: how many values lie in buckets above b
    above = histogram.flip(0).cumsum(0).flip(0) - histogram
    wanted = {
        k: int(torch.nonzero((above < k) & (above + histogram >= k))[0])
        for k, c in zip(ks, out, strict=True)
        if c is None
    }
    inside: dict[int, list[Tensor]] = {bucket: [] for bucket in wanted.values()}
    for i in range(len(sizes)):
        bits = _bits(blocks(i))
        high = bits >> _LOW
        for bucket, found in inside.items():
            found.append((bits[high == bucket] & ((1 << _LOW) - 1)).to(torch.int16))
    for position, k in enumerate(ks):
        if out[position] is None:
            bucket = wanted[k]
            out[position] = _refine(blocks, sizes, inside[bucket], bucket, k - int(above[bucket]))
    return [cut for cut in out if cut is not None]


def _refine(blocks: Blocks, sizes: list[int], found: list[Tensor], bucket: int, rest: int) -> Cut:
    """The cut that keeps `rest` of the bucket's values, whose low bits are `found`, block by block."""
    low = torch.zeros(1 << _LOW, dtype=torch.int64)
    for values in found:
        low += torch.bincount(values, minlength=1 << _LOW).cpu()
    above = low.flip(0).cumsum(0).flip(0) - low
    level = int(torch.nonzero((above < rest) & (above + low >= rest))[0])
    pattern = (bucket << _LOW) | level
    threshold = float(torch.tensor(pattern, dtype=torch.int32).view(torch.float32))
    rest -= int(above[level])
    if rest == int(low[level]):
        return Cut(threshold, 1 << 62)
    offset = 0
    for i, values in enumerate(found):
        here = int((values == level).sum())
        if rest <= here:
            equal = torch.nonzero(_bits(blocks(i)) == pattern).view(-1)
            return Cut(threshold, offset + int(equal[rest - 1]))
        rest -= here
        offset += sizes[i]
    raise AssertionError("the blocks changed between two passes")
