"""tsv_m: task singular vectors, decorrelated (Gargiulo et al. 2025, CVPR; algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key
from model_fusion.merge.methods.subspace.matrices import (
    SVDS,
    SubspaceParams,
    check_choice,
    subspace_method,
    svd,
    whiten,
)


@dataclass(frozen=True)
class TsvParams(SubspaceParams):
    """rank_fraction: share of its singular triples that each task keeps (None: 1 / number of models, the paper's).

    svd: exact, or randomized where fewer triples are kept than there are.
    """

    rank_fraction: float | None = None
    svd: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("svd", self.svd, SVDS)
        if self.rank_fraction is not None and not 0 < self.rank_fraction <= 1:
            raise InputError(f"rank_fraction must lie in (0, 1], got {self.rank_fraction:g}")


def _tsv(tasks: list[Tensor], params: SubspaceParams, key: Key) -> Tensor:
    """wh([U_1 … U_T]) · diag(S) · wh([V_1 … V_T]), the triples cut to int(share · min(m, n)) a task, at least 1."""
    own = cast(TsvParams, params)
    share = 1 / len(tasks) if own.rank_fraction is None else own.rank_fraction
    count = max(1, int(share * min(tasks[0].shape)))
    parts = [svd(task, count, own.svd, key.seed) for task in tasks]
    return whiten(
        torch.cat([p.u for p in parts], dim=1), torch.cat([p.s for p in parts]), torch.cat([p.vh for p in parts])
    )


subspace_method("tsv_m", TsvParams, _tsv)
