"""Which dtype this CPU computes a matrix product fastest in, by measuring."""

from __future__ import annotations

import time
from functools import cache

import torch


@cache
def fastest_dtype() -> torch.dtype:
    """torch.bfloat16 where it beats float32 by a fifth or more on matrices of a small LLM's size, else float32."""
    best = {dtype: _seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if best[torch.bfloat16] < 0.8 * best[torch.float32] else torch.float32


def _seconds(dtype: torch.dtype) -> float:
    a, b = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    found = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        found.append(time.perf_counter() - start)
    return min(found[1:])
