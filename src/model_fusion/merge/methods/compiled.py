"""An optional kernel for the hottest loop (della's ranks), compiled by numba where it is installed: the extra `fast`.

It returns exactly what the numpy code beside its caller returns; a test compares them bit by bit. It compiles
once a machine and is loaded from numba's cache after that.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import numpy as np

OFF = "MODEL_FUSION_NO_COMPILE"
"""Set this environment variable to run without the kernel."""

_EXACT = 64
"""Up to so many undecided elements a row are ranked by counting, more by sorting the row."""


@cache
def kernel(name: str) -> Any:
    """The compiled function of that name; None where numba is not installed or is switched off."""
    if os.environ.get(OFF) or importlib.util.find_spec("numba") is None:
        return None
    from numba import njit

    try:
        return njit(nogil=True, cache=True)(_KERNELS[name])
    except RuntimeError:  # nowhere to keep the compiled code: each process compiles it again
        return njit(nogil=True)(_KERNELS[name])


def _above_rank(bits: Any, limit: Any, shift: int, width: int, keep: Any) -> None:  # pragma: no cover
    """Into `keep`: whether each element's mean rank within its row is above its limit (see della.above_rank)."""
    rows, columns = bits.shape
    count = np.empty(width, np.int32)
    end = np.empty(width, np.int32)
    mixed = np.empty(width, np.bool_)
    bucket = np.empty(columns, np.int32)
    unsure = np.empty(columns, np.int32)
    for r in range(rows):
        row, asked, out = bits[r], limit[r], keep[r]
        count[:] = 0
        mixed[:] = False
        lowest = (np.max(row) >> shift) - width + 1
        for c in range(columns):
            value = row[c]
            prefix = value >> shift
            b = min(max(prefix - lowest, 1), value)
            bucket[c] = b
            count[b] += 1
            if (prefix << shift) != value or b == 1:
                mixed[b] = True
        total = 0
        for b in range(width):
            total += count[b]
            end[b] = total
        few = 0
        for c in range(columns):
            b = bucket[c]
            out[c] = end[b] - 0.5 * (count[b] + 1) > asked[c]
            unsure[few] = c
            few += mixed[b] & (end[b] - count[b] <= asked[c]) & (end[b] - 1 > asked[c])
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
                less = equal = 0
                for d in range(columns):
                    less += row[d] < row[c]
                    equal += row[d] == row[c]
                out[c] = less + (equal - 1) * 0.5 > asked[c]


_KERNELS = {"above_rank": _above_rank}
