"""dare_linear and dare_ties: task vectors dropped at random and rescaled (Yu et al. 2024, "Super Mario")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, Sees, register
from model_fusion.merge.methods.blocks import BLOCK, delta, total
from model_fusion.merge.methods.random_masks import apply_mask_, kept
from model_fusion.merge.methods.task_arithmetic import add_elected, add_weighted
from model_fusion.merge.methods.ties import Trimmed

Rescale = Literal["l1", "1/d", "none"]


@dataclass(frozen=True)
class DareParams:
    """rescale: true or "l1" restores the L1 norm of the tensor's task vector, "1/d" (the paper) divides by
    the density, false or "none" leaves the survivors as they are.

    normalize: divide by the weights; lambda_: factor on the merged task vector.
    sign_before_weight: dare_ties elects signs from unweighted task vectors. int8_mask changes nothing.
    """

    normalize: bool = False
    lambda_: float = 1.0
    rescale: bool | Rescale = True
    sign_before_weight: bool = False
    int8_mask: bool = False

    def __post_init__(self) -> None:
        if self.rescale not in (True, False, "l1", "1/d", "none"):
            raise InputError(f"rescale must be true, false, 'l1', '1/d' or 'none', got {self.rescale!r}")

    @property
    def mode(self) -> Rescale:
        """The rescaling by name."""
        if isinstance(self.rescale, bool):
            return "l1" if self.rescale else "none"
        return self.rescale


def l1_ratio(before: float, after: float) -> float:
    """‖δ‖₁ ÷ ‖masked δ‖₁; 1 where nothing survives, so that zeros stay zeros."""
    return before / after if after > 0 else 1.0


Masks = list[tuple[Tensor | None, float]]
"""Each model's flat int8 mask (−1 kept, 0 dropped; None: everything kept) and rescaling factor."""


def draw_masks(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Trimmed],
    params: DareParams,
    key: Key,
    *,
    draw: Callable[[Tensor, Any, Key, int, int], Tensor],
) -> Masks:
    """Every model's mask and factor. `draw(|δ| [rows, columns], parameters, key, model, start) -> int8` makes the
    mask of some whole rows, of which `start` is the first flat index.
    """
    assert base is not None
    columns = max(base.shape[-1], 1) if base.dim() else 1
    step = max(1, BLOCK // columns) * columns
    flat_base = base.reshape(-1)
    out: Masks = []
    for i, (model, p) in enumerate(zip(models, model_params, strict=True)):
        if p.density >= 1.0 and key.masks is None:
            out.append((None, 1.0))
            continue
        flat = model.reshape(-1)
        mask = torch.empty(flat.numel(), dtype=torch.int8, device=flat.device)
        if key.masks is not None:
            mask.copy_(key.masks[i].reshape(-1).bool().to(torch.int8).neg_())
        before = after = 0.0
        for start in range(0, flat.numel(), step):
            part = slice(start, start + step)
            size = delta(flat[part], flat_base[part]).abs_()
            if key.masks is None:
                mask[part] = draw(size.view(-1, columns), p, key, i, start).view(-1)
            if params.mode == "l1":
                before += total(size)
                after += total(apply_mask_(size, mask[part]))
        factor = l1_ratio(before, after) if params.mode == "l1" else 1.0
        if params.mode == "1/d" and p.density > 0:
            factor = 1.0 / p.density
        out.append((mask, factor))
    return out


def _bernoulli(size: Tensor, p: Trimmed, key: Key, model: int, start: int) -> Tensor:
    return kept(p.density, key.seed, key.name, model, start, size.numel())


def masked_merge(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Trimmed],
    params: DareParams,
    key: Key,
    state: Masks,
    start: int,
    *,
    elect: bool,
    method: str,
) -> Tensor:
    """The masked and rescaled task vectors, added up as ties or as task arithmetic adds them."""
    assert base is not None
    wide = base.float()
    deltas = []
    for model, (mask, factor) in zip(models, state, strict=True):
        task = delta(model, wide)
        if mask is not None:
            apply_mask_(task, mask[start : start + task.numel()])
        deltas.append(task if factor == 1.0 else task.mul_(factor))
    weights = [p.weight for p in model_params]
    if elect:
        before = params.sign_before_weight
        return add_elected(deltas, weights, wide, params.lambda_, params.normalize, before, method)
    return add_weighted(deltas, weights, wide, params.lambda_, params.normalize, method)


for _name, _elect in (("dare_linear", False), ("dare_ties", True)):
    register(
        Method(
            _name,
            Sees.TWO_PASS,
            DareParams,
            Trimmed,
            "required",
            statistics=partial(draw_masks, draw=_bernoulli),
            chunk=partial(masked_merge, elect=_elect, method=_name),
        )
    )
