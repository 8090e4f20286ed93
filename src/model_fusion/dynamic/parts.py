"""What each expert has beyond the shared model, compressed: v_t = θ_t − θ*, matrices as factors, vectors whole.

Twin-Merging (Lu et al. 2024, arXiv 2406.15479, equation 6): the exclusive knowledge of expert t is SVD_r(θ_t − θ*),
taken from the merged model θ*, not from the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.errors import InputError


@dataclass(frozen=True)
class Part:
    """All experts' differences in one tensor of shape [m, …], seen as the matrix [m, n].

    A matrix: `up` [m, T·r], `down` [T·r, n]; expert t's rows are t·r … (t+1)·r, so that Σ w_t U_t V_t is one product.
    A vector: `up` is None and `down` [T, m] holds the differences themselves.
    """

    shape: tuple[int, ...]
    experts: int
    down: Tensor
    up: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + (0 if self.up is None else self.up.nbytes)

    def mixed(self, weights: Tensor) -> Tensor:
        """Σ_t w_t v_t for each row of weights [B, T]: [B, *shape]."""
        if self.up is None:
            return (weights.to(self.down) @ self.down).view(-1, *self.shape)
        spread = weights.repeat_interleave(len(self.down) // self.experts, dim=1).to(self.down)
        return ((self.up * spread[:, None]) @ self.down).view(-1, *self.shape)


Parts = dict[str, Part]


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U S [m, k], Vᵀ [k, n]) of the best rank-`rank` approximation; k is less where the matrix has lower rank.

    From the eigenvectors of the smaller Gram matrix in float64: with Q the leading ones of A Aᵀ, Q Qᵀ A is the
    truncated SVD, and a tall embedding costs no more than its narrow side.
    """
    a = matrix.double()
    tall = a.shape[0] >= a.shape[1]
    values, vectors = torch.linalg.eigh(a.T @ a if tall else a @ a.T)
    floor = (max(a.shape) * torch.finfo(torch.float32).eps) ** 2 * float(values[-1].clamp(min=0))
    kept = min(rank, int((values > floor).sum()))
    chosen = vectors[:, len(values) - kept :].flip(1)
    up, down = (a @ chosen, chosen.T) if tall else (chosen, chosen.T @ a)
    return up.float(), down.float()


def rank_of(shape: Sequence[int], fraction: float) -> int:
    """r = fraction · min(m, n), at least 1."""
    m = shape[0]
    return max(1, int(fraction * min(m, math.prod(shape[1:]))))


def part(shared: Tensor, experts: Sequence[Tensor], fraction: float) -> Part | None:
    """The experts' differences in one tensor, in its dtype; None where all are zero."""
    differences = [expert.float() - shared.float() for expert in experts]
    if not any(bool(d.any()) for d in differences):
        return None
    shape = tuple(shared.shape)
    if len(shape) < 2:
        return Part(shape, len(experts), torch.stack([d.reshape(-1) for d in differences]).to(shared.dtype))
    rank = rank_of(shape, fraction)
    factors = [truncated(d.reshape(shape[0], -1), rank) for d in differences]
    width = max(down.shape[0] for _, down in factors)
    ups = [torch.nn.functional.pad(up, (0, width - up.shape[1])) for up, _ in factors]
    downs = [torch.nn.functional.pad(down, (0, 0, 0, width - down.shape[0])) for _, down in factors]
    return Part(shape, len(experts), torch.cat(downs).to(shared.dtype), torch.cat(ups, dim=1).to(shared.dtype))


def exclusive(
    shared: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    fraction: float,
    *,
    step: Callable[[], object] = lambda: None,
) -> Parts:
    """The part of every floating-point tensor in which an expert differs from the shared model.

    fraction: of each matrix's smaller side, in (0, 1]. `step` is called after each tensor. Integer tensors stay the
    shared model's. Raises InputError where names or shapes differ, or values are not finite.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"rank {fraction}: give a share of each matrix's smaller side, above 0 and at most 1")
    if not experts:
        raise InputError("no expert was given: name at least one")
    for number, expert in enumerate(experts):
        if odd := sorted(set(shared) ^ set(expert)):
            raise InputError(f"expert {number} and the shared model differ in {len(odd)} tensors, first {odd[0]!r}")
    found: Parts = {}
    for name, tensor in shared.items():
        own = [expert[name] for expert in experts]
        if any(t.shape != tensor.shape for t in own):
            raise InputError(f"tensor {name!r}: the experts and the shared model differ in shape")
        if tensor.is_floating_point():
            if not all(bool(t.isfinite().all()) for t in (tensor, *own)):
                raise InputError(f"tensor {name!r}: an expert or the shared model holds NaN or Inf")
            if (made := part(tensor, own, fraction)) is not None:
                found[name] = made
        step()
    return found
