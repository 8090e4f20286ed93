"""ram and ramplus_tl: mean over the models that changed an element (Reinforced Agent Merging, 2026).

A model changed an element where |δ| > epsilon; alone it keeps its δ, together the mean is taken. ramplus_tl
stretches what a model changed alone by 1 + r·min(ρ, α), ρ = its shared ÷ its unique elements in the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, register
from model_fusion.merge.methods.blocks import delta, parts


@dataclass(frozen=True)
class RamParams:
    """epsilon: changes up to it count as none."""

    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise InputError(f"epsilon must not be negative, got {self.epsilon:g}")


@dataclass(frozen=True)
class RamPlusParams(RamParams):
    """r: strength of the stretch; alpha: bound on the ratio of shared to unique elements."""

    r: float = 0.1
    alpha: float = 0.2


def _changed(deltas: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Each model's bool mask of changed elements, and how many models changed each."""
    masks = [d.abs() > epsilon for d in deltas]
    count = masks[0].float()
    for mask in masks[1:]:
        count += mask.float()
    return masks, count


def _stretch(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: RamPlusParams,
    key: Key,
) -> list[float]:
    """Each model's factor on what it changed alone."""
    assert base is not None
    shared, unique = [0] * len(models), [0] * len(models)
    flat, flat_base = [m.reshape(-1) for m in models], base.reshape(-1)
    for part in parts(flat_base.numel()):
        masks, count = _changed([delta(m[part], flat_base[part]) for m in flat], params.epsilon)
        alone = count == 1
        for i, mask in enumerate(masks):
            lone = int((mask & alone).sum())
            unique[i] += lone
            shared[i] += int(mask.sum()) - lone
    ratios = [s / u if u else 0.0 for s, u in zip(shared, unique, strict=True)]
    return [1.0 + params.r * min(max(ratio, 0.0), params.alpha) for ratio in ratios]


def _ram(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: RamParams,
    key: Key,
    state: list[float] | None,
    start: int,
) -> Tensor:
    assert base is not None
    wide = base.float()
    deltas = [delta(m, wide) for m in models]
    masks, count = _changed(deltas, params.epsilon)
    alone = count == 1
    out = torch.zeros_like(wide)
    for i, (task, mask) in enumerate(zip(deltas, masks, strict=True)):
        task.masked_fill_(~mask, 0.0)
        if state is not None:
            task = torch.where(alone, task * state[i], task)
        out += task
    return out.div_(count.clamp_min_(1.0)).add_(wide)


register(Method("ram", Sees.ELEMENTWISE, RamParams, NoParams, "required", chunk=_ram))
register(Method("ramplus_tl", Sees.TWO_PASS, RamPlusParams, NoParams, "required", statistics=_stretch, chunk=_ram))
