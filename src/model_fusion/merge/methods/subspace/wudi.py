"""wudi: the merged task vector that the tasks' own inputs disturb least (Cheng et al. 2025, arXiv 2503.08099),
in the closed form with a spectral filter (SWUDI: Wei et al. 2026, arXiv 2606.07289)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, check_unit
from model_fusion.merge.methods.subspace.matrices import SubspaceParams, subspace_method, svd


@dataclass(frozen=True)
class WudiParams(SubspaceParams):
    """time: how long the gradient flow from Στ runs; 0 leaves task arithmetic, ∞ gives the pseudo-inverse solution.

    rank_fraction: share of the input directions, the strongest first, that are filtered at all (the paper's top K).
    """

    time: float = 10.0
    rank_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit("rank_fraction", self.rank_fraction)
        if self.time < 0:
            raise InputError(f"time must not be negative, got {self.time:g}")


def _wudi(tasks: list[Tensor], params: SubspaceParams, key: Key) -> Tensor:
    """Gradient flow of ½ Σ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖² from Στ, in closed form.

    C = Σ τ_tᵀτ_t/‖τ_t‖² = V Λ Vᵀ, D = Σ τ_t τ_tᵀτ_t/‖τ_t‖², h = 1 − e^(−Λ·time) on the first K:
    Σ − Σ V h Vᵀ + D V (h/Λ) Vᵀ.
    """
    own = cast(WudiParams, params)
    total = tasks[0].clone()
    for task in tasks[1:]:
        total += task
    sizes = [float(torch.linalg.matrix_norm(task)) for task in tasks]
    units = [task / size for task, size in zip(tasks, sizes, strict=True) if size > 0]
    count = int(own.rank_fraction * total.shape[1])
    if count == 0:
        return total
    found = svd(torch.cat(units), count)
    v, energy = found.vh.T, found.s.square()
    passed = -torch.expm1(-energy * own.time)
    pulled = total.new_zeros(total.shape[0], v.shape[1])
    for task, size in zip(tasks, sizes, strict=True):
        if size > 0:
            pulled += task @ (task.T @ (task @ v)) / size**2
    return total + (pulled * (passed / energy) - (total @ v) * passed) @ found.vh


subspace_method("wudi", WudiParams, _wudi)
