"""dare_linear and dare_ties: task vectors dropped at random and rescaled (Yu et al. 2024, "Super Mario")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, Sees, register
from model_fusion.merge.methods.blocks import delta, parts, total
from model_fusion.merge.methods.random_masks import dropped
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


def _drop_(task: Tensor, density: float, key: Key, model: int, start: int) -> Tensor:
    if key.masks is not None:
        mask = key.masks[model].reshape(-1)[start : start + task.numel()]
        return task.masked_fill_(~mask.bool(), 0.0)
    if density >= 1.0:
        return task
    if density <= 0.0:
        return task.zero_()
    mask = dropped(density, key.seed, key.name, model, start, task.numel())
    return task.masked_fill_(mask.to(task.device), 0.0)


def _factors(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Trimmed],
    params: DareParams,
    key: Key,
) -> list[float]:
    """Each model's rescaling factor."""
    if params.mode == "none":
        return [1.0] * len(models)
    if params.mode == "1/d":
        return [1.0 / p.density if p.density > 0 else 1.0 for p in model_params]
    assert base is not None
    flat_base = base.reshape(-1)
    out = []
    for i, (model, p) in enumerate(zip(models, model_params, strict=True)):
        if p.density >= 1.0 and key.masks is None:
            out.append(1.0)
            continue
        before = after = 0.0
        flat = model.reshape(-1)
        for part in parts(flat.numel()):
            size = delta(flat[part], flat_base[part]).abs_()
            before += total(size)
            after += total(_drop_(size, p.density, key, i, part.start))
        out.append(l1_ratio(before, after))
    return out


def _dare(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Trimmed],
    params: DareParams,
    key: Key,
    state: list[float],
    start: int,
    *,
    elect: bool,
) -> Tensor:
    assert base is not None
    wide = base.float()
    deltas = []
    for i, (model, p) in enumerate(zip(models, model_params, strict=True)):
        task = _drop_(delta(model, wide), p.density, key, i, start)
        deltas.append(task if state[i] == 1.0 else task.mul_(state[i]))
    weights = [p.weight for p in model_params]
    if elect:
        before = params.sign_before_weight
        return add_elected(deltas, weights, wide, params.lambda_, params.normalize, before, "dare_ties")
    return add_weighted(deltas, weights, wide, params.lambda_, params.normalize, "dare_linear")


for _name, _elect in (("dare_linear", False), ("dare_ties", True)):
    register(
        Method(
            _name,
            Sees.TWO_PASS,
            DareParams,
            Trimmed,
            "required",
            statistics=_factors,
            chunk=partial(_dare, elect=_elect),
        )
    )
