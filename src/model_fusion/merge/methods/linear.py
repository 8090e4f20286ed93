"""linear and passthrough: weighted means of the weights themselves (Wortsman et al. 2022, Model soups)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, register


@dataclass(frozen=True)
class Weighted:
    """weight: this model's share."""

    weight: float = 1.0


@dataclass(frozen=True)
class LinearParams:
    """normalize: divide by the sum of the weights."""

    normalize: bool = True


def weight_sum(weights: Sequence[float], method: str) -> float:
    """Σ w; InputError where it is 0, since dividing by it is asked for."""
    value = float(sum(weights))
    if abs(value) < 1e-12:
        listed = ", ".join(f"{w:g}" for w in weights)
        raise InputError(f"{method}: the weights {listed} sum to 0; change them or set normalize: false")
    return value


def _linear(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Weighted],
    params: LinearParams,
    key: Key,
    state: object,
    start: int,
) -> Tensor:
    """Σ wθ, divided by Σ w when normalised."""
    weights = [p.weight for p in model_params]
    scale = weight_sum(weights, "linear") if params.normalize else 1.0
    out = models[0].to(torch.float32, copy=True).mul_(weights[0])
    for model, weight in zip(models[1:], weights[1:], strict=True):
        out += model.to(torch.float32, copy=True).mul_(weight)
    return out if scale == 1.0 else out.div_(scale)


@dataclass(frozen=True)
class Scaled:
    """scale: factor on the tensor."""

    scale: float = 1.0


def _passthrough(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Scaled],
    params: NoParams,
    key: Key,
    state: object,
    start: int,
) -> Tensor:
    """scale·θ"""
    return models[0].to(torch.float32, copy=True).mul_(model_params[0].scale)


register(Method("linear", Sees.ELEMENTWISE, LinearParams, Weighted, "optional", chunk=_linear))
register(Method("passthrough", Sees.ELEMENTWISE, NoParams, Scaled, "optional", max_models=1, chunk=_passthrough))
