"""What the subspace methods share: which tensors are matrices, their SVD in float64, and the base that is added back.

The SVD goes through the eigenvectors of the Gram matrix of the shorter side (A Aᵀ = U S² Uᵀ), in float64: it takes
less time than LAPACK's SVD, and what it loses are singular values below 1e-8 of the largest, far under what float32
weights hold. `benchmarks/subspace.py` measures both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, Sees, register
from model_fusion.merge.methods.blocks import delta
from model_fusion.merge.methods.linear import Weighted
from model_fusion.merge.methods.task_arithmetic import add_weighted
from model_fusion.merge.spectrum import leading, whole

TOLERANCE = 1e-6
"""Of the largest singular value: what is smaller is rounding and has no direction. It is left out."""
DEPENDENT = 1e-5
"""The same for sets of unit vectors: a direction that others span to this precision is left out."""
SVDS = ("exact", "randomized")
RESTS = ("mean", "sum")


@dataclass(frozen=True)
class SubspaceParams:
    """lambda_: factor on the merged task vector (the papers' α or scaling coefficient).

    rest: how tensors that are no matrices are merged (norms, biases; token tables, see `embeddings`): the mean of
    their task vectors, as the papers' code does for 1-D tensors, or the sum. λ applies to them too.
    embeddings: treat tables with one row a token (input embeddings, heads) as matrices as well. The papers merge image
    encoders, which have none; a 151k × 896 table takes 1.1 GB a copy in the float64 of the SVD.
    """

    lambda_: float = 1.0
    rest: str = "mean"
    embeddings: bool = False

    def __post_init__(self) -> None:
        check_choice("rest", self.rest, RESTS)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raises InputError where a parameter has none of its values."""
    if value not in known:
        raise InputError(f"{name} must be {' or '.join(known)}, got {value!r}")


@dataclass(frozen=True)
class Svd:
    """u [m, k], s [k] descending, vh [k, n], float64; directions of singular value 0 are not among the k."""

    u: Tensor
    s: Tensor
    vh: Tensor


def svd(matrix: Tensor, count: int | None = None, how: str = "exact", seed: int = 0, size: float | None = None) -> Svd:
    """The first `count` singular triples (None: all) of a float64 matrix.

    `how`: exact, or randomized (random projection with power iterations, in float32). `size`: the singular value
    that TOLERANCE is a share of (None: the matrix's own largest).
    """
    limit = min(matrix.shape) if count is None else min(count, *matrix.shape)
    if how == "randomized" and limit < min(matrix.shape):
        found = leading(whole(matrix.float()), limit, seed)
        u, s, vh = found.u.double(), found.s.double(), found.vh.double()
    else:
        short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        values, vectors = torch.linalg.eigh(short @ short.T)
        s = values.clamp_min_(0.0).sqrt_().flip(0)[:limit]
        u, vh = vectors.flip(1)[:, :limit], None
    most = float(s[0]) if size is None else size
    kept = int((s > TOLERANCE * most).sum())
    u, s = u[:, :kept], s[:kept]
    if vh is not None:
        return Svd(u, s, vh[:kept])
    vh = (u.T @ short).div_(s[:, None])
    return Svd(u, s, vh) if short is matrix else Svd(vh.T, s, u.T)


def whiten(u: Tensor, middle: Tensor, vh: Tensor) -> Tensor:
    """wh(u) · diag(middle) · wh(vh): u [m, k] and vh [k, n] of unit columns and rows, middle [k]; → [m, n].

    wh(A) = U Vᵀ of A's SVD, the nearest matrix of orthonormal columns, is A (AᵀA)^(−1/2): two k × k roots instead of
    two SVDs of the wide concatenations.
    """
    if middle.numel() == 0:
        return u @ vh
    core: Tensor = _inverse_root(u.T @ u).mul_(middle) @ _inverse_root(vh @ vh.T)
    return (u @ core) @ vh


def _inverse_root(gram: Tensor) -> Tensor:
    """G^(−1/2) on the directions that are there."""
    values, vectors = torch.linalg.eigh(gram)
    there = values > DEPENDENT**2 * values[-1]
    vectors = vectors[:, there]
    root: Tensor = (vectors * values[there].rsqrt()) @ vectors.T
    return root


Combine = Callable[[list[Tensor], SubspaceParams, Key], Tensor]
"""Task vectors of one matrix, float64 [out, in], to the merged one."""
Check = Callable[[Sequence[Tensor], Tensor, Any, Key], None]
"""What may refuse a matrix: models, base, params, key."""


def is_matrix(base: Tensor, params: SubspaceParams, key: Key) -> bool:
    """Whether a tensor is merged by its singular vectors."""
    return base.dim() == 2 and (key.rows != "tokens" or params.embeddings)


def subspace_method(name: str, kind: type, combine: Combine, check: Check | None = None) -> Method:
    """Registers the method that applies `combine` to matrices and `rest` to everything else; `check` sees a matrix's
    float32 models and base before it is merged."""

    def whole(
        models: Sequence[Tensor],
        base: Tensor | None,
        model_params: Sequence[Weighted],
        params: SubspaceParams,
        key: Key,
    ) -> Tensor:
        assert base is not None
        tasks = [(m.double() - base).mul_(p.weight) for m, p in zip(models, model_params, strict=True)]
        if not all(bool(torch.isfinite(task).all()) for task in tasks):
            raise InputError(f"{name}: {key.name!r} holds NaN or Inf and has no singular vectors: mend it first")
        if key.rows == "inputs":
            tasks = [task.T for task in tasks]
        with one_thread():
            if check is not None:
                check(models, base, params, key)
            merged = combine(tasks, params, key) if any(bool(task.any()) for task in tasks) else tasks[0]
        if key.rows == "inputs":
            merged = merged.T
        return (base + merged * params.lambda_).float()

    def chunk(
        models: Sequence[Tensor],
        base: Tensor | None,
        model_params: Sequence[Weighted],
        params: SubspaceParams,
        key: Key,
        state: object,
        start: int,
    ) -> Tensor:
        assert base is not None
        wide = base.float()
        deltas = [delta(m, wide) for m in models]
        share = params.lambda_ / (len(models) if params.rest == "mean" else 1)
        return add_weighted(deltas, [p.weight for p in model_params], wide, share, False, name)

    made = Method(name, Sees.WHOLE_TENSOR, kind, Weighted, "required", chunk=chunk, whole=whole)
    return register(replace(made, needs_whole=is_matrix, equal_norms=True))


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS and LAPACK on one thread: their sums, and so the bytes, do not depend on the machine's cores.

    In a streamed merge the tensors are the parallelism, one thread each.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
