"""Low-rank factors of a difference of weights: pure functions of tensors, no file, no name of a module.

A product is B A with A [rank, in] and B [out, rank]. Energy is the squared Frobenius norm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge import spectrum

POWER = 3
EXACT_UP_TO = 1024
"""Up to this smaller side the whole spectrum is computed; beyond, the leading part by random projection."""


@dataclass(frozen=True)
class Factors:
    """A [rank, in] and B [out, rank] in float32; energy of B A, and of the matrix it stands for."""

    a: Tensor
    b: Tensor
    kept: float
    total: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def share(self) -> float:
        """Kept energy as a share of the whole; a zero matrix is kept wholly."""
        return 1.0 if self.total == 0 else min(self.kept / self.total, 1.0)


@dataclass(frozen=True)
class Wanted:
    """How much to keep: `rank` at most, or the smallest rank with `energy` (a share) of the energy, or both.

    exact: True always computes the whole spectrum, False never, None where the smaller side is ≤ EXACT_UP_TO.
    """

    rank: int | None = None
    energy: float | None = None
    exact: bool | None = None

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise InputError("give a rank or a share of energy to keep")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank {self.rank}: give 1 or more")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise InputError(f"energy {self.energy:g}: give a share in (0, 1]")


def truncate(delta: Tensor, wanted: Wanted, seed: int = 0) -> Factors:
    """The best B A for a float matrix [out, in], by singular values (Eckart–Young)."""
    matrix = delta.float()
    total = sum(float(part.double().square().sum()) for part in torch.split(matrix.reshape(-1), 1 << 20))
    most = min(matrix.shape)
    limit = min(wanted.rank or most, most)
    if total == 0.0 or most == 0:
        return Factors(matrix.new_zeros(0, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], 0), 0.0, total)
    exact = wanted.exact if wanted.exact is not None else most <= EXACT_UP_TO
    if exact:
        return _cut(*_svd(matrix), limit, wanted.energy, total)
    if wanted.energy is None:
        return _cut(*leading(matrix, limit, seed), limit, None, total)
    guess = min(16, limit)
    while True:
        u, s, vh = leading(matrix, guess, seed)
        reached = float(s.double().square().sum()) >= wanted.energy * total
        if reached or guess >= limit:
            return _cut(u, s, vh, limit, wanted.energy, total)
        guess = min(2 * guess, limit)
        if 2 * guess > most:  # a projection this wide costs more than the whole spectrum
            return _cut(*_svd(matrix), limit, wanted.energy, total)


def leading(matrix: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` singular triples by random projection; never above the true values."""
    found = spectrum.leading(spectrum.whole(matrix), count, seed, POWER)
    return found.u, found.s, found.vh


def join(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Σ weight · B A exactly, as one pair: the matrices side by side. `pairs` holds (A, B, weight)."""
    return torch.cat([a for a, _, _ in pairs]), torch.cat([b * weight for _, b, weight in pairs], dim=1)


def retruncate(a: Tensor, b: Tensor, wanted: Wanted) -> Factors:
    """The best lower-rank stand-in for B A, from small matrices alone: QR of both sides, SVD of the core."""
    left, core_left = torch.linalg.qr(b.double())
    right, core_right = torch.linalg.qr(a.double().T)
    u, s, vh = _svd(core_left @ core_right.T)
    total = float(s.square().sum())
    if total == 0.0:
        return Factors(a[:0].float(), b[:, :0].float(), 0.0, 0.0)
    limit = min(wanted.rank or len(s), len(s))
    return _cut(left @ u, s, vh @ right.T, limit, wanted.energy, total)


def average(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """peft's "linear": A and B averaged apart, each with √weight. Cheap, and NOT Σ weight · B A: it has cross terms."""
    if len({a.shape[0] for a, _, _ in pairs}) > 1:
        raise InputError("linear needs adapters of one rank: use cat or svd")
    a = sum((math.copysign(math.sqrt(abs(w)), w) * a for a, _, w in pairs), torch.zeros(()))
    b = sum((math.sqrt(abs(w)) * b for _, b, w in pairs), torch.zeros(()))
    return a, b


def _cut(u: Tensor, s: Tensor, vh: Tensor, limit: int, energy: float | None, total: float) -> Factors:
    """The first singular triples: at most `limit`, and no more than `energy` asks for; √S on both sides."""
    squares = s.double().square().cumsum(0)
    # what lies below float32's rounding of the largest value is no direction (the usual numerical rank)
    noise = float(s[0]) * torch.finfo(torch.float32).eps * max(u.shape[0], vh.shape[1])
    count = min(limit, int((s > noise).sum()))
    if energy is not None:
        # float32 singular values sum to the energy only up to rounding: 1.0 must not run past the last of them
        enough = int((squares < energy * total * (1 - 1e-6)).sum()) + 1
        count = min(count, enough)
    root = s[:count].sqrt()
    kept = float(squares[count - 1]) if count else 0.0
    a, b = root[:, None] * vh[:count], u[:, :count] * root
    return Factors(a.float().contiguous(), b.float().contiguous(), kept, total)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh
