"""Loops over numpy arrays for `compiled`: plain Python that numba turns into machine code. Not to be called as it is.

Most loops do one thing to one run of a few thousand elements, which stay in the first-level cache: so they become
vector instructions. Arrays are one-dimensional unless said otherwise; `out` and what ends in "into" are overwritten.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model_fusion.merge.methods.selection import SERIAL

_EXACT = 64
"""Up to so many undecided elements a row are ranked by counting, more by sorting the row."""
_RUN = 2048


def above_rank(bits: Any, limit: Any, shift: int, width: int, keep: Any) -> None:
    """Into `keep`: whether each element's mean rank within its row is above its limit (see della.above_rank).

    Each loop does one thing: so most become vector instructions. Two histograms, because equal neighbours would
    otherwise wait for each other's count.
    """
    rows, columns = bits.shape
    even, uneven, start = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.int32)
    # an element survives below `sure`, and does not from `top` on; between them its bucket must be looked into
    sure, top = np.empty(width, np.float32), np.empty(width, np.float32)
    loose = np.empty(width, np.bool_)
    bucket = np.empty(columns, np.uint32)
    odd = np.empty(columns, np.bool_)
    unsure = np.empty(columns, np.int32)
    for r in range(rows):
        row, asked, out = bits[r], limit[r], keep[r]
        largest = np.int32(0)
        for c in range(columns):
            largest = max(largest, row[c])
        lowest = np.int32((largest >> shift) - width + 1)
        for c in range(columns):
            value = row[c]
            prefix = value >> shift
            b = min(max(prefix - lowest, np.int32(1)), value)
            bucket[c] = np.uint32(b)
            odd[c] = ((prefix << shift) != value) | (b == 1)
        even[:] = 0
        uneven[:] = 0
        for c in range(0, columns - 1, 2):
            even[bucket[c]] += 1
            uneven[bucket[c + 1]] += 1
        if columns % 2:
            even[bucket[columns - 1]] += 1
        loose[:] = False
        for c in range(columns):
            if odd[c]:
                loose[bucket[c]] = True
        for b in range(width):
            even[b] += uneven[b]
        below = np.int32(0)
        for b in range(width):
            start[b] = below
            below += even[b]
        for b in range(width):
            end = np.int32(start[b] + even[b])
            # a bucket of one value has one mean rank, exact in float32 below 8 million columns
            middle = np.float32(np.int32(start[b] + end - 1)) * np.float32(0.5)
            sure[b] = np.float32(start[b]) if loose[b] else middle
            top[b] = np.float32(np.int32(end - 1)) if loose[b] else np.float32(-1)
        few = 0
        for c in range(columns):
            b = bucket[c]
            mark = asked[c]
            out[c] = mark < sure[b]
            unsure[few] = c
            few += (mark >= sure[b]) & (mark < top[b])
        if few > _EXACT:
            ordered = np.sort(row)
            for i in range(few):
                c = unsure[i]
                low = np.searchsorted(ordered, row[c])
                high = np.searchsorted(ordered, row[c], side="right")
                out[c] = (low + high - 1) * 0.5 > asked[c]
        else:
            for i in range(few):
                c = unsure[i]
                value = row[c]
                less = equal = np.int32(0)
                for d in range(columns):
                    less += np.int32(row[d] < value)
                    equal += np.int32(row[d] == value)
                out[c] = less + (equal - 1) * 0.5 > asked[c]


def mixed(counter: Any, first: Any, second: Any, out: Any) -> None:
    """Into `out`: random bits from mixed counters and a block's two keys (see random_masks)."""
    for j in range(out.size):
        x = np.uint32(counter[j] ^ first)
        x = np.uint32(x ^ (x >> np.uint32(16)))
        x = np.uint32(x * np.uint32(0x7FEB352D))
        x = np.uint32(x ^ (x >> np.uint32(15)))
        x = np.uint32(x * np.uint32(0x846CA68B))
        x = np.uint32(x ^ (x >> np.uint32(16)))
        out[j] = np.uint32(x + second)


def difference(model: Any, base: Any, out: Any) -> None:
    """float32 model − base of bfloat16 numbers, given as uint16 patterns."""
    left, right = np.empty(_RUN, np.uint32), np.empty(_RUN, np.uint32)
    wide, wide_base = left.view(np.float32), right.view(np.float32)
    for start in range(0, out.size, _RUN):
        here = out[start : start + _RUN]
        one, two = model[start : start + _RUN], base[start : start + _RUN]
        for j in range(here.size):
            left[j] = np.uint32(one[j]) << np.uint32(16)
        for j in range(here.size):
            right[j] = np.uint32(two[j]) << np.uint32(16)
        for j in range(here.size):
            here[j] = wide[j] - wide_base[j]


def variance(tasks: Any, out: Any) -> None:
    """The population variance of each column of tasks, float32 [M, N]."""
    count = tasks.shape[0]
    if count == 2:
        one, two = tasks[0], tasks[1]
        for j in range(out.size):
            half = (one[j] - two[j]) * np.float32(0.5)
            out[j] = half * half
        return
    mean = np.empty(_RUN, np.float32)
    for start in range(0, out.size, _RUN):
        here = out[start : start + _RUN]
        mean[:] = 0
        here[:] = 0
        for i in range(count):
            task = tasks[i, start : start + _RUN]
            for j in range(here.size):
                mean[j] += task[j]
        for j in range(here.size):
            mean[j] /= np.float32(count)
        for i in range(count):
            task = tasks[i, start : start + _RUN]
            for j in range(here.size):
                off = task[j] - mean[j]
                here[j] += off * off
        for j in range(here.size):
            here[j] /= np.float32(count)


def counts(bits: Any, level: Any) -> Any:
    """How many patterns are above the level, on it, and not zero."""
    above = ties = nonzero = np.int32(0)
    for j in range(bits.size):
        above += np.int32(bits[j] > level)
    for j in range(bits.size):
        ties += np.int32(bits[j] == level)
    for j in range(bits.size):
        nonzero += np.int32(bits[j] != 0)
    return above, ties, nonzero


def energy_of(task: Any, bits: Any, low: Any, high: Any, into: Any) -> Any:
    """Σ task² where low ≤ bits ≤ high, in the order of `selection.halved`."""
    for j in range(task.size):
        into[j] = task[j] * task[j] if (bits[j] >= low) & (bits[j] <= high) else np.float32(0)
    left = task.size
    while left > SERIAL:
        half = (left + 1) // 2
        lower, upper = into[:half], into[half:left]
        for j in range(upper.size):
            lower[j] += upper[j]
        left = half
    total = 0.0
    for j in range(left):
        total += into[j]
    return total


def keep_selected(task: Any, spread: Any, limit: Any) -> None:
    """Zeroes the task where the spread is not above the limit."""
    for j in range(task.size):
        task[j] = np.float32(0) if spread[j] <= limit else task[j]


def add_agreeing(tasks: Any, weights: Any, base: Any, out: Any) -> None:
    """base + Σ(wδm) ÷ max(Σ(wm), 1e-6) of tasks, float32 [M, N]; m: δ's sign is that of Σδ."""
    sign = np.empty(_RUN, np.int32)
    votes = sign.view(np.float32)
    flipped = np.empty(_RUN, np.int32)
    size = flipped.view(np.float32)
    total = np.empty(_RUN, np.int32)
    merged = total.view(np.float32)
    share = np.empty(_RUN, np.float32)
    patterns = tasks.view(np.int32)
    for start in range(0, out.size, _RUN):
        here, wide = out[start : start + _RUN], base[start : start + _RUN]
        votes[:] = 0
        merged[:] = 0
        share[:] = 0
        for i in range(tasks.shape[0]):
            task = tasks[i, start : start + _RUN]
            for j in range(here.size):
                votes[j] += task[j]
        for j in range(here.size):
            sign[j] &= np.int32(-(2**31))
        for i in range(tasks.shape[0]):
            task_bits, weight = patterns[i, start : start + _RUN], weights[i]
            for j in range(here.size):
                flipped[j] = task_bits[j] ^ sign[j]
            for j in range(here.size):
                share[j] += weight if size[j] > 0 else np.float32(0)
                merged[j] += (np.float32(0) if size[j] < 0 else size[j]) * weight
        for j in range(here.size):
            merged[j] /= max(share[j], np.float32(1e-6))
        for j in range(here.size):
            total[j] ^= sign[j]
        for j in range(here.size):
            here[j] = merged[j] + wide[j]
