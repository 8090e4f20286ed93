"""Differences and sums over tensors in cache-sized blocks, with results that no thread count changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 1 << 17
_RUN = 1 << 10


def sizes(numel: int) -> list[int]:
    """The lengths of a tensor's blocks."""
    return [min(BLOCK, numel - start) for start in range(0, numel, BLOCK)]


def delta(model: Tensor, base: Tensor | None) -> Tensor:
    """model − base in float32, a fresh tensor (without a base: a float32 copy)."""
    wide = model.to(torch.float32, copy=True)
    return wide if base is None else wide.sub_(base.float())


def delta_blocks(model: Tensor, base: Tensor | None) -> Callable[[int, int], Tensor]:
    """(block number, step) → every step-th of the flat float32 differences in that block."""
    flat = model.reshape(-1)
    flat_base = None if base is None else base.reshape(-1)

    def block(i: int, step: int) -> Tensor:
        part = slice(i * BLOCK, (i + 1) * BLOCK, step)
        return delta(flat[part], None if flat_base is None else flat_base[part])

    return block


def total(values: Tensor) -> float:
    """The sum in a fixed order: float32 within runs of 1024, float64 over them.

    torch's own CPU sum of a whole vector depends on its thread count; one sum a run does not.
    """
    flat = values.reshape(-1)
    whole = flat.numel() - flat.numel() % _RUN
    runs = flat[:whole].view(-1, _RUN).sum(dim=1).double().sum()
    return float(runs + flat[whole:].sum(dtype=torch.float64))


def dot(a: Tensor, b: Tensor) -> float:
    """Σ a·b over flat float32 tensors, in a fixed order."""
    return total(a * b)


def delta_square(model: Tensor, base: Tensor) -> float:
    """‖model − base‖², in a fixed order."""
    flat, flat_base = model.reshape(-1), base.reshape(-1)
    return sum(total(delta(flat[part], flat_base[part]).square_()) for part in parts(flat.numel()))


def parts(numel: int) -> Iterator[slice]:
    """The slices of a flat tensor's blocks."""
    return (slice(start, min(start + BLOCK, numel)) for start in range(0, numel, BLOCK))
