"""Differences and sums over tensors in cache-sized blocks, with results that no thread count changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 16


def sizes(numel: int) -> list[int]:
    """The lengths of a tensor's blocks."""
    return [min(BLOCK, numel - start) for start in range(0, numel, BLOCK)]


def delta(model: Tensor, base: Tensor | None) -> Tensor:
    """model − base in float32, a fresh tensor (without a base: a float32 copy)."""
    wide = model.to(torch.float32, copy=True)
    return wide if base is None else wide.sub_(base.float())


def delta_blocks(model: Tensor, base: Tensor | None) -> Callable[[int], Tensor]:
    """Block number → the flat float32 difference in that block."""
    flat = model.reshape(-1)
    flat_base = None if base is None else base.reshape(-1)

    def block(i: int) -> Tensor:
        part = slice(i * BLOCK, (i + 1) * BLOCK)
        return delta(flat[part], None if flat_base is None else flat_base[part])

    return block


def total(values: Tensor) -> float:
    """The sum in a fixed order: torch's own CPU sum depends on its thread count."""
    if values.device.type == "cpu":
        return float(np.add.reduce(values.reshape(-1).numpy(), dtype=np.float64))
    return float(values.sum(dtype=torch.float64))


def dot(a: Tensor, b: Tensor) -> float:
    """Σ a·b over flat tensors, products in float32, sums in float64, in a fixed order."""
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    return sum(total(flat_a[part] * flat_b[part]) for part in parts(flat_a.numel()))


def parts(numel: int) -> Iterator[slice]:
    """The slices of a flat tensor's blocks."""
    return (slice(start, min(start + BLOCK, numel)) for start in range(0, numel, BLOCK))
