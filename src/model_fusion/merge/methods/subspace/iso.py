"""iso_c and iso_cts: a merged task vector whose directions are equally strong (Marczak et al. 2025, ICML; §4, §5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from model_fusion.merge.methods.base import Key, check_unit
from model_fusion.merge.methods.subspace.matrices import (
    Check,
    SubspaceParams,
    Svd,
    subspace_method,
    svd,
    whiten,
)
from model_fusion.merge.methods.subspace.rank import check_rank


@dataclass(frozen=True)
class IsoParams(SubspaceParams):
    """force: merge even where a task vector has the rank of a LoRA."""

    force: bool = False


@dataclass(frozen=True)
class IsoCtsParams(IsoParams):
    """common_space_fraction: share of the directions taken from the sum; the tasks share the rest equally."""

    common_space_fraction: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit("common_space_fraction", self.common_space_fraction)


def _total(tasks: list[Tensor]) -> Tensor:
    total = tasks[0].clone()
    for task in tasks[1:]:
        total += task
    return total


def _iso_c(tasks: list[Tensor], params: SubspaceParams, key: Key) -> Tensor:
    """mean(σ) · U Vᵀ of Στ; the mean is over all min(m, n) singular values, also where some are 0."""
    found = svd(_total(tasks))
    return (found.u @ found.vh).mul_(found.s.sum() / min(tasks[0].shape))


def _iso_cts(tasks: list[Tensor], params: SubspaceParams, key: Key) -> Tensor:
    """mean(σ) · wh([U_common, U_1 … U_T]) · wh([V_common, V_1 … V_T]).

    Common: the leading triples of Στ. U_t: those of τ_t with the common outputs projected away.
    """
    rank, models = min(tasks[0].shape), len(tasks)
    fraction = cast(IsoCtsParams, params).common_space_fraction
    each = min(rank // models, round((rank - int(rank * fraction)) / models))
    parts: list[Svd] = []
    outputs = tasks[0].new_zeros(tasks[0].shape[0], 0)
    if common := rank - each * models:
        parts = [svd(_total(tasks), common)]
        outputs = parts[0].u
    if each:
        for task in tasks:
            left = task - outputs @ (outputs.T @ task)
            parts.append(svd(left, each, size=float(torch.linalg.matrix_norm(task))))
    sizes = torch.cat([p.s for p in parts])
    middle = torch.full_like(sizes, float(sizes.sum()) / rank)
    return whiten(torch.cat([p.u for p in parts], dim=1), middle, torch.cat([p.vh for p in parts]))


def _not_low_rank(method: str) -> Check:
    """Refuses task vectors of a LoRA's rank."""

    def check(models: Sequence[Tensor], base: Tensor, params: IsoParams, key: Key) -> None:
        if not params.force:
            check_rank(method, models, base, key.name)

    return check


subspace_method("iso_c", IsoParams, _iso_c, _not_low_rank("iso_c"))
subspace_method("iso_cts", IsoCtsParams, _iso_cts, _not_low_rank("iso_cts"))
