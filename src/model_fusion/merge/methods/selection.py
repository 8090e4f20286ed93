"""The exact k largest magnitudes of a tensor without a sort, ties broken by the lowest flat index.

A non-negative float32 orders like its bit pattern. A sample guesses a narrow bracket of patterns around the
k-th largest; one pass counts what lies above it and collects what lies inside (a few per cent); the k-th
largest is then exact. A bad guess costs another pass, never a wrong answer. The values arrive in blocks, so
they (differences of two models, say) need never exist as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Blocks = Callable[[int, int], Tensor]
"""(block number, step) → every step-th float32 value of the block; they may be overwritten."""
Bits = NDArray[np.int32]

_SAMPLE = 1 << 14
_SIGMAS = 3.5
LARGEST = 0x7FFFFFFF


@dataclass(frozen=True)
class Cut:
    """Keeps magnitudes above `threshold`, and those equal to it at flat indices up to `last`."""

    threshold: float
    last: int

    @cached_property
    def _below(self) -> float:
        """The float32 just below the threshold: magnitudes ≥ the threshold are those above it."""
        return float(np.nextafter(np.float32(self.threshold), np.float32(0)))

    def limits(self, count: int, start: int) -> list[tuple[slice, float]]:
        """The slices of `count` values from flat index `start`, each with the magnitude above which it is kept."""
        split = min(max(self.last + 1 - start, 0), count)
        both = ((slice(0, split), self._below), (slice(split, count), self.threshold))
        return [(part, limit) for part, limit in both if part.start < part.stop]

    def drop_small_(self, values: Tensor, start: int) -> Tensor:
        """Zeroes, in place, what is not kept of flat float32 `values` that begin at flat index `start`."""
        for part, limit in self.limits(values.numel(), start):
            if limit > 0:
                torch.ops.aten.hardshrink.out(values[part], limit, out=values[part])
        return values


KEEP_ALL = Cut(0.0, 1 << 62)
KEEP_NONE = Cut(float("inf"), -1)


def _bits(values: Tensor) -> Bits:
    return values.abs_().view(torch.int32).cpu().numpy()


@dataclass
class _Search:
    """The k-th largest pattern is believed to lie in [low, high]; what one pass found there."""

    low: int
    high: int
    above: int = 0
    inside: list[int] = field(default_factory=list)
    found: list[Bits] = field(default_factory=list)

    def look(self, bits: Bits) -> None:
        """Count one block. A bracket of a single pattern needs no collecting."""
        if self.high < LARGEST:
            self.above += int(np.count_nonzero(bits > self.high))
        if self.low == self.high:
            self.inside.append(int(np.count_nonzero(bits == self.low)))
            return
        offsets = (bits - np.int32(self.low)).view(np.uint32)
        self.found.append(np.compress(offsets <= np.uint32(self.high - self.low), bits))
        self.inside.append(self.found[-1].size)

    def missed(self, k: int) -> _Search | None:
        """Where to look next; None when the k-th largest is inside."""
        if k <= self.above:
            return _Search(self.high + 1, LARGEST)
        return _Search(0, self.low - 1) if k > self.above + sum(self.inside) else None


@dataclass(frozen=True)
class Tally:
    """One block beside a level: patterns above it, on it, and not zero; each row's Σ x² above it and on it."""

    above: int
    ties: int
    nonzero: int
    energy: list[float]
    tied_energy: list[float]


def cuts(blocks: Blocks, sizes: list[int], ks: Sequence[int | float]) -> list[Cut]:
    """For each k the cut that keeps exactly the k largest magnitudes, ties by lowest flat index.

    **Arguments**
    blocks, sizes: the values, block by block, and the blocks' lengths.
    ks: numbers to keep, from 0 to all; a float is a share of the non-zero values (rounded down).

    **Returns** one Cut a k, with flat indices counted over all blocks.
    """
    total = sum(sizes)
    out = [None if isinstance(k, float) else KEEP_NONE if k <= 0 else KEEP_ALL if k >= total else None for k in ks]
    open_ = [i for i, cut in enumerate(out) if cut is None]
    if open_:
        sample = _sample(blocks, sizes)
        searches = {i: _guess(sample, ks[i], total) for i in open_}
        while searches:
            nonzero = 0
            for i in range(len(sizes)):
                bits = _bits(blocks(i, 1))
                for search in searches.values():
                    search.look(bits)
                if any(isinstance(ks[i], float) for i in searches):
                    nonzero += int(np.count_nonzero(bits))
            for i, search in list(searches.items()):
                wanted = ks[i]
                k = int(wanted * nonzero) if isinstance(wanted, float) else wanted
                del searches[i]
                if k <= 0:
                    out[i] = KEEP_NONE
                elif (again := search.missed(k)) is not None:
                    searches[i] = again
                else:
                    out[i] = _settle(blocks, sizes, search, k - search.above)
    return [cut for cut in out if cut is not None]


Looked = tuple[Tensor, Tensor]
"""float32 values ≥ 0, [N], and the rows, [M, N], whose elements they choose between."""


def cut_and_energy(
    blocks: Callable[[int, int], Looked], sizes: list[int], share: float, tally: Callable[[Tensor, Tensor, int], Tally]
) -> tuple[Cut, list[float]]:
    """The cut that keeps a share of the non-zero values, and each row's Σ x² over what is kept.

    One pass where ties are so many that the sample knows the level of the cut; else `cuts` finds it first.
    """

    def values(i: int, step: int) -> Tensor:
        return blocks(i, step)[0]

    def tallied(level: int) -> tuple[list[Tally], int]:
        """Every block beside the level, and how many of its ties are kept."""
        seen = [tally(*blocks(i, 1), level) for i in range(len(sizes))]
        return seen, int(share * sum(one.nonzero for one in seen)) - sum(one.above for one in seen)

    guess = _guess(_sample(values, sizes), share, sum(sizes))
    if guess.low == guess.high:
        seen, rest = tallied(guess.low)
        if 0 < rest <= sum(one.ties for one in seen):
            return _keep_first(blocks, sizes, seen, guess.low, rest)
    level = int(np.float32(cuts(values, sizes, [share])[0].threshold).view(np.int32))
    seen, rest = tallied(level)
    return _keep_first(blocks, sizes, seen, level, rest)


def _keep_first(
    blocks: Callable[[int, int], Looked], sizes: list[int], seen: list[Tally], level: int, rest: int
) -> tuple[Cut, list[float]]:
    """The cut, and the energies, of what lies above the level and of its first `rest` ties."""
    energy = [sum(parts) for parts in zip(*(one.energy for one in seen), strict=True)]
    threshold, last, offset = float(np.int32(level).view(np.float32)), 1 << 62, 0
    if rest <= 0:
        return (KEEP_NONE if threshold == math.inf else Cut(threshold, -1)), energy
    for i, one in enumerate(seen):
        more = one.tied_energy
        if rest < one.ties:
            values, rows = blocks(i, 1)
            first = np.flatnonzero(_bits(values) == level)[:rest]
            last, more = offset + int(first[-1]), halved(rows.cpu()[:, first].square())
        energy = [sum(parts) for parts in zip(energy, more, strict=True)]
        offset, rest = offset + sizes[i], rest - one.ties
        if rest <= 0:
            break
    return Cut(threshold, last), energy


SERIAL = 1 << 10
"""So few numbers are summed one by one."""


def halved(rows: Tensor) -> list[float]:
    """The sums of float32 rows [R, N], which are overwritten, in one order on every path: the upper
    half is added to the lower until SERIAL are left; these one by one in float64.
    """
    left = rows.shape[1]
    while left > SERIAL:
        half = (left + 1) // 2
        rows[:, : left - half] += rows[:, half:left]
        left = half
    if not left:
        return [0.0] * len(rows)
    return [float(end) for end in np.cumsum(rows[:, :left].cpu().numpy(), axis=1, dtype=np.float64)[:, -1]]


def _sample(blocks: Blocks, sizes: list[int]) -> Bits:
    """Patterns of about _SAMPLE of the values, largest first."""
    step = max(1, sum(sizes) // _SAMPLE) | 1  # odd: even steps would see few of a matrix's columns
    return np.sort(np.concatenate([_bits(blocks(i, min(step, n))) for i, n in enumerate(sizes) if n]))[::-1]


def _guess(sample: Bits, wanted: int | float, total: int) -> _Search:
    """A bracket that holds the wanted one unless the sample is 3.5 standard deviations off."""
    n = sample.size
    share = wanted * np.count_nonzero(sample) / n if isinstance(wanted, float) else wanted / total
    margin = _SIGMAS * math.sqrt(n * max(share * (1 - share), 1 / n)) if n < total else 1.0
    first, last = math.floor(share * n - margin), math.ceil(share * n + margin)
    return _Search(int(sample[last]) if last < n else 0, int(sample[first]) if first >= 0 else LARGEST)


def _settle(blocks: Blocks, sizes: list[int], search: _Search, rest: int) -> Cut:
    """The cut that keeps `rest` of the values inside the bracket."""
    level, equal = search.low, search.inside
    if search.found:
        every = np.sort(np.concatenate(search.found))  # a partition is slower where many are equal
        level = int(every[every.size - rest])
        rest -= every.size - int(np.searchsorted(every, level, side="right"))
        equal = [int(np.count_nonzero(found == level)) for found in search.found]
    threshold = float(np.int32(level).view(np.float32))
    if rest == sum(equal):
        return Cut(threshold, 1 << 62)
    offset = 0
    for i, here in enumerate(equal):
        if rest <= here:
            return _last_of(blocks(i, 1), threshold, offset, level, rest)
        rest -= here
        offset += sizes[i]
    raise AssertionError("the blocks changed between two passes")


def _last_of(values: Tensor, threshold: float, offset: int, level: int, rest: int) -> Cut:
    """The cut whose last kept tie is the block's `rest`-th."""
    return Cut(threshold, offset + int(np.flatnonzero(_bits(values) == level)[rest - 1]))
