"""consensus: task arithmetic on entries that several tasks need (Wang et al. 2024, arXiv 2405.07813, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, Sees, register
from model_fusion.merge.methods.blocks import delta


@dataclass(frozen=True)
class ConsensusParams:
    """at_least: how many masks must keep an entry; lambda_: factor on the sum of the task vectors there."""

    at_least: int = 2
    lambda_: float = 0.3

    def __post_init__(self) -> None:
        if self.at_least < 1:
            raise InputError(f"at_least must be 1 or more, got {self.at_least}")


@dataclass(frozen=True)
class Strength:
    """strength: the λ of this model's TALL mask, above 0; larger keeps less. The paper chooses it among 0.2 … 0.6."""

    strength: float = 0.4

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise InputError(f"strength must be above 0, got {self.strength:g}")


def relevant(deltas: Sequence[Tensor], total: Tensor, strengths: Sequence[float]) -> list[Tensor]:
    """TALL masks, bool: where |τ_t| > λ_t · |Στ − τ_t|."""
    return [own.abs() > (total - own).abs_().mul_(s) for own, s in zip(deltas, strengths, strict=True)]


def _consensus(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Strength],
    params: ConsensusParams,
    key: Key,
    state: object,
    start: int,
) -> Tensor:
    """base + λ Στ where at least so many TALL masks keep the entry: what no task needs, or one alone, is dropped."""
    assert base is not None
    if params.at_least > len(models):
        raise InputError(f"at_least {params.at_least}: give 1 to {len(models)}, the number of models")
    wide = base.float()
    deltas = [delta(model, wide) for model in models]
    total = deltas[0].clone()
    for own in deltas[1:]:
        total += own
    agreed = torch.zeros_like(total, dtype=torch.int32)
    for mask in relevant(deltas, total, [p.strength for p in model_params]):
        agreed += mask
    return total.mul_(params.lambda_).masked_fill_(agreed < params.at_least, 0.0).add_(wide)


register(Method("consensus", Sees.ELEMENTWISE, ConsensusParams, Strength, "required", min_models=2, chunk=_consensus))
