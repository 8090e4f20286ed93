"""fisher and regmean: means that weigh a model's weights by what its data say of them.

Both take, beside each model's tensor, a statistic of it (`key.data`); a tensor without one is the weighted mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, Sees, check_unit, register
from model_fusion.merge.methods.blocks import parts, total
from model_fusion.merge.methods.linear import Weighted, weight_sum
from model_fusion.merge.methods.subspace.matrices import one_thread


@dataclass(frozen=True)
class FisherParams:
    """floor: share of the tensor's mean Fisher that none of its elements falls below; where the data say nothing of
    an element, that makes it the weighted mean. The paper's code has an absolute 1e-6, which would drown the small
    gradients of large models."""

    floor: float = 1e-6

    def __post_init__(self) -> None:
        check_unit("floor", self.floor)


@dataclass(frozen=True)
class RegmeanParams:
    """alpha: factor on the Gram matrices' off-diagonals, in [0, 1].

    ridge: share of each input's own energy added to the diagonal; it matters at alpha 1, where few samples leave
    directions undecided: those take the weighted mean.
    """

    alpha: float = 0.9
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        check_unit("alpha", self.alpha)
        check_unit("ridge", self.ridge)


def _weights(model_params: Sequence[Weighted], method: str) -> list[float]:
    weights = [p.weight for p in model_params]
    if min(weights) < 0:
        raise InputError(f"{method}: weight {min(weights):g} is negative; give weights of 0 or more")
    weight_sum(weights, method)
    return weights


def _scale(
    models: Sequence[Tensor], base: Tensor | None, model_params: Sequence[Weighted], params: FisherParams, key: Key
) -> float:
    """1 / the tensor's mean Fisher over all models; 0 where all are 0."""
    if key.data is None:
        return 0.0
    sums = []
    for one in key.data:
        flat = one.reshape(-1)
        if bool((flat < 0).any()):
            raise InputError(f"fisher: the statistic of {key.name!r} holds negative values; collect it again")
        sums += [total(flat[part].float()) for part in parts(flat.numel())]
    mean = sum(sums) / (len(key.data) * models[0].numel())
    return 1.0 / mean if mean > 0 else 0.0


def _fisher(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Weighted],
    params: FisherParams,
    key: Key,
    scale: float,
    start: int,
) -> Tensor:
    """Σ wFθ / Σ wF (Matena & Raffel 2022, equation 4), F diagonal."""
    weights = _weights(model_params, "fisher")
    top = torch.zeros_like(models[0], dtype=torch.float32)
    bottom = torch.zeros_like(top)
    for i, (model, weight) in enumerate(zip(models, weights, strict=True)):
        if key.data is None or scale == 0.0:
            share = torch.full_like(top, weight)
        else:
            own = key.data[i].reshape(-1)[start : start + model.numel()].to(torch.float32, copy=True)
            share = own.mul_(scale).clamp_min_(params.floor).mul_(weight)
        bottom += share
        top += share.mul_(model)
    # without a floor, an element may have no Fisher at all
    empty = bottom == 0
    if bool(empty.any()):
        mean = sum((w * m.float() for w, m in zip(weights, models, strict=True)), torch.zeros(())) / sum(weights)
        return torch.where(empty, mean, top / bottom.masked_fill_(empty, 1.0))
    return top.div_(bottom)


def _as_matrix(tensor: Tensor, key: Key) -> Tensor:
    """[out, in], float64: a view of the weight as it acts on inputs (a convolution's kernel flat)."""
    wide = tensor.double()
    return wide.T if key.rows == "inputs" else wide.reshape(wide.shape[0], -1)


def shrunk(gram: Tensor, alpha: float) -> Tensor:
    """α G + (1 − α) diag(G), float64."""
    own = gram.double() * alpha
    own.diagonal().copy_(gram.diagonal())
    return own


def _regmean(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Weighted],
    params: RegmeanParams,
    key: Key,
) -> Tensor:
    """W Σ wG = Σ wWG, G = shrunk XᵀX (Jin et al. 2023, equation 2), solved for W minus the weighted mean.

    Both are the same where Σ G has an inverse. Inputs that no data ever showed (dead units) keep the mean.
    """
    weights = _weights(model_params, "regmean")
    mean = sum((w * m.double() for w, m in zip(weights, models, strict=True)), torch.zeros(())) / sum(weights)
    if key.data is None:
        return mean.float()
    middle = _as_matrix(mean, key)
    width = middle.shape[1]
    gram, pull = middle.new_zeros(width, width), torch.zeros_like(middle)
    with one_thread():
        for model, own, weight in zip(models, key.data, weights, strict=True):
            if tuple(own.shape) != (width, width):
                raise InputError(f"regmean: {key.name!r} takes {width} inputs, its Gram matrix is {list(own.shape)}")
            one = shrunk(own, params.alpha).mul_(weight)
            gram += one
            pull.addmm_(_as_matrix(model, key) - middle, one)
        # every input in units of its own energy: a few huge activations do not drown the others
        energy = gram.diagonal().clone()
        units = energy.clamp_min(0.0).sqrt_()
        units = torch.where(units > 0, units.reciprocal(), 1.0)
        gram.mul_(units).mul_(units[:, None])
        gram.diagonal().copy_(torch.where(energy > 0, 1.0 + params.ridge, 1.0))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            raise InputError(f"regmean: the Gram matrices of {key.name!r} have no inverse; set alpha below 1")
        change = torch.cholesky_solve((pull * units).T, factor).T * units
    merged = middle + change
    return (merged.T if key.rows == "inputs" else merged.reshape(mean.shape)).float()


register(
    Method(
        "fisher",
        Sees.TWO_PASS,
        FisherParams,
        Weighted,
        "forbidden",
        statistics=_scale,
        chunk=_fisher,
        needs_data="fisher",
    )
)
register(Method("regmean", Sees.WHOLE_TENSOR, RegmeanParams, Weighted, "forbidden", whole=_regmean, needs_data="gram"))
