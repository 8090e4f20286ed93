"""The leading singular triples of a matrix that is read a few rows at a time, and how far they can be off.

A matrix is its shape and a function `rows(start, stop)` → float32 [stop − start, columns]; it is never held whole.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING, POWER = 8, 2
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Matrix:
    """`rows` is called several times for the same rows."""

    shape: tuple[int, int]
    rows: Callable[[int, int], Tensor]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        height = max(_BLOCK // max(self.shape[1], 1), 1)
        for start in range(0, self.shape[0], height):
            stop = min(start + height, self.shape[0])
            yield slice(start, stop), self.rows(start, stop)

    def times(self, right: Tensor) -> Tensor:
        """[rows, w] of a [columns, w]."""
        return torch.cat([block @ right for _, block in self.blocks()])

    def transposed_times(self, left: Tensor) -> Tensor:
        """[columns, w] of a [rows, w]."""
        total = torch.zeros(self.shape[1], left.shape[1], device=left.device)
        for place, block in self.blocks():
            total.addmm_(block.T, left[place])
        return total


def whole(matrix: Tensor) -> Matrix:
    """A matrix that is in memory."""
    return Matrix((matrix.shape[0], matrix.shape[1]), lambda start, stop: matrix[start:stop])


@dataclass(frozen=True)
class Leading:
    """u [rows, k], s [k] descending, vh [k, columns]; none above its true value."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def cut(self, count: int) -> "Leading":
        return Leading(self.u[:, :count], self.s[:count], self.vh[:count])


def leading(matrix: Matrix, count: int, seed: int = 0, power: int = POWER) -> Leading:
    """The first `count` singular triples by random projection, with `power` iterations orthonormalised between them
    (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1)."""
    wide = min(count + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    # drawn on the CPU, so that a seed means the same on every device
    start = torch.randn(matrix.shape[1], wide, generator=generator).to(matrix.rows(0, 1).device)
    basis = _orthonormal(matrix.times(start))
    for _ in range(power):
        basis = _orthonormal(matrix.times(_orthonormal(matrix.transposed_times(basis))))
    u, s, vh = torch.linalg.svd(matrix.transposed_times(basis).T, full_matrices=False)
    return Leading((basis @ u)[:, :count], s[:count], vh[:count])


def angle_error(matrix: Matrix, found: Leading, count: int) -> float:
    """Bound on the sine of the largest angle between the first `count` found and true singular vectors.

    Wedin 1972: sin θ ≤ ‖M V − U S‖ / gap. The gap to the next value is taken from `found`, so where the projection
    missed that value the bound is an estimate. 1 means: not determined.
    """
    count = min(count, len(found.s))
    if count >= min(matrix.shape):
        return 0.0
    following = float(found.s[count]) if count < len(found.s) else 0.0
    top = found.cut(count)
    residual = float(torch.linalg.matrix_norm(matrix.times(top.vh.T.contiguous()) - top.u * top.s))
    gap = float(found.s[count - 1]) - following - residual
    return min(residual / gap, 1.0) if gap > 0 else 1.0


def overlap(one: Tensor, two: Tensor) -> float:
    """Mean cos² of the principal angles between two subspaces given by orthonormal columns: 1 equal, 0 orthogonal.
    Two random subspaces of dimension k in n have k / n."""
    k = min(one.shape[1], two.shape[1])
    return float((one.double().T @ two.double()).square().sum()) / k if k else 0.0


def rounding_edge(shape: tuple[int, int], mean_squares: list[tuple[float, torch.dtype]]) -> float:
    """The largest singular value that rounding to the storage dtypes alone makes: σ(√rows + √columns).

    `mean_squares`: mean square and dtype of each stored matrix. A value w has ulp eps·2^⌊log₂|w|⌋ and rounding
    variance ulp² / 12; over a binade 2^⌊log₂|w|⌋ / |w| has mean square 3 / (8 ln 2).
    """
    share = 3 / (8 * math.log(2)) / 12
    variance = sum(square * torch.finfo(dtype).eps ** 2 * share for square, dtype in mean_squares)
    return math.sqrt(variance) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis
