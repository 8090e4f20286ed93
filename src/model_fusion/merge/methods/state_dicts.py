"""Merging the state dicts of any PyTorch modules, without files or recipes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model_fusion.architecture.roles import depth_of, rows_of, stacks
from model_fusion.errors import InputError
from model_fusion.merge.findings import unequal
from model_fusion.merge.methods.base import Key, Method, build, get
from model_fusion.merge.methods.blocks import delta_blocks, delta_square, sizes
from model_fusion.merge.methods.selection import Cut, cuts
from model_fusion.merge.methods.ties import kept
from model_fusion.recipe.parameters import check_value, evaluate


def global_cuts(tensors: Sequence[tuple[Tensor, Tensor]], density: float) -> list[Cut]:
    """One cut a tensor that together keep max(1, int(d·N)) of all (model, base) pairs' largest |δ|.

    Equal magnitudes at the threshold are kept by the tensors' order, then by flat index.
    """
    return cuts_together([model.numel() for model, _ in tensors], tensors.__getitem__, density)


def cuts_together(numels: Sequence[int], pair: Callable[[int], tuple[Tensor, Tensor]], density: float) -> list[Cut]:
    """As `global_cuts`, of pairs that are asked for by number, in order, a few times each."""
    blocks = [(number, i) for number, numel in enumerate(numels) for i in range(len(sizes(numel)))]
    lengths = [n for numel in numels for n in sizes(numel)]

    def block(i: int, step: int) -> Tensor:
        number, inner = blocks[i]
        return delta_blocks(*pair(number))(inner, step)

    whole = cuts(block, lengths, [kept(density, sum(lengths))])[0]
    out, offset = [], 0
    for numel in numels:
        out.append(Cut(whole.threshold, whole.last - offset))
        offset += numel
    return out


def merge_state_dicts(
    method: str,
    state_dicts: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    model_params: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    depth: Mapping[str, float] | None = None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    **params: Any,
) -> dict[str, Tensor]:
    """Merges tensors of equal names, float32 inside, each written in the first dict's dtype.

    Integer and bool tensors are taken from the first dict. Names that share one tensor in every dict (tied weights)
    share the result. BatchNorm's running statistics are merged like weights: re-estimate them on data afterwards,
    most of all after task-vector methods, which can make a variance negative.

    **Arguments**
    model_params: one mapping a model (weight, density …), each value a number or, as in a recipe, a list of filters
        by tensor name or a gradient over the layers; params: the method's own (normalize, …).
    depth: where each tensor's layer lies, 0 first to 1 last (`lines` needs it); without it, from names that count their
        layers ("layers.3.…", "h.3.…", "blocks.3.…").
    statistics: what a data-based method needs, one mapping a model from `collect_statistics`: weight's name → its
        statistic. Tensors that no mapping names are the weighted mean.

    Warns where the method wants task vectors of about equal length and they are not.

    **Raises** InputError where names, shapes, dtypes, parameters or the base do not fit, or values are NaN or Inf.
    """
    chosen = get(method)
    if not state_dicts:
        raise InputError(f"{method}: no state dicts given")
    own = build(chosen.params, params, method)
    given = [dict(p) for p in (model_params or [{}] * len(state_dicts))]
    if len(given) != len(state_dicts):
        raise InputError(f"{method}: {len(state_dicts)} state dicts but parameters for {len(given)}")
    names = list(state_dicts[0])
    for i, other in enumerate([*state_dicts[1:], *([] if base is None else [base])], start=1):
        if odd := sorted(set(names) ^ set(other)):
            raise InputError(f"state dict {i} differs from the first in {len(odd)} names, the first is {odd[0]!r}")
    floats = [n for n in names if state_dicts[0][n].is_floating_point()]
    every = [*state_dicts, *([] if base is None else [base])]
    for i, one in enumerate(every):
        where = f"state dict {i}" if i < len(state_dicts) else "the base"
        for name in names:
            _check_tensor(one[name], name in floats, f"{where}: {name!r}")
    lengths = stacks(names)
    places = {n: (depth_of(n, lengths) if lengths else None) if depth is None else depth.get(n) for n in floats}
    each_of = {n: [_params(chosen, one, n, places[n]) for one in given] for n in floats}
    model_cuts: list[dict[str, Cut]] | None = None
    if getattr(own, "trim", "tensor") == "global":
        if base is None:
            raise InputError(f"{method} needs a base model: give base=")
        model_cuts = [
            dict(zip(floats, global_cuts([(d[n], base[n]) for n in floats], _one_density(each_of, i)), strict=True))
            for i, d in enumerate(state_dicts)
        ]
    data = _Data(chosen, statistics, state_dicts)
    squares = [0.0] * len(state_dicts)
    out: dict[str, Tensor] = {}
    first_name: dict[tuple[object, ...], str] = {}
    for name in names:
        own_tensor = state_dicts[0][name]
        twin = first_name.setdefault(_storage([d[name] for d in every]), name)
        if twin != name:
            out[name] = out[twin]
            continue
        if name not in floats:
            out[name] = own_tensor.detach().clone()
            continue
        key = Key(
            seed,
            name,
            cuts=None if model_cuts is None else [c[name] for c in model_cuts],
            depth=places[name],
            rows="inputs" if data.inputs_first(name) else rows_of(name),
            data=data.of(name, own_tensor.device),
        )
        each = each_of[name]
        with torch.no_grad():
            merged = chosen.run([d[name] for d in state_dicts], None if base is None else base[name], each, own, key)
        out[name] = merged.to(own_tensor.dtype)
        if chosen.equal_norms and base is not None:
            for i, (one, own_params) in enumerate(zip(state_dicts, each, strict=True)):
                squares[i] += own_params.weight**2 * delta_square(one[name].detach(), base[name].detach())
    for text in unequal({f"state dict {i}": math.sqrt(square) for i, square in enumerate(squares)}):
        warnings.warn(f"{method}: {text}", stacklevel=2)
    return out


def _params(method: Method, given: Mapping[str, Any], name: str, place: float | None) -> Any:
    """One model's parameters for one tensor."""
    values = dict(given)
    for key, value in given.items():
        if not isinstance(value, list):
            continue
        check_value(key, value)
        if not isinstance(value[0], dict) and place is None:
            raise InputError(f"{method.name}: {key!r} is a gradient over layers; say where they are with depth=")
        found = evaluate(value, name, place or 0.0)
        if found is None:
            del values[key]
        else:
            values[key] = found
    return build(method.model_params, values, method.name)


def _one_density(each_of: Mapping[str, Sequence[Any]], model: int) -> float:
    found = {each[model].density for each in each_of.values()}
    if len(found) > 1:
        raise InputError("trim 'global' cuts all tensors at once: give each model one density")
    return float(found.pop())


class _Data:
    """The statistics of a merge, checked."""

    def __init__(
        self, method: Method, given: Sequence[Mapping[str, Tensor]] | None, models: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self._given = given or []
        if (method.needs_data is None) != (given is None):
            verb = "takes no" if given is not None else "needs"
            raise InputError(f"{method.name} {verb} statistics= (of collect_statistics), one mapping a model")
        if method.needs_data is not None and len(self._given) != len(models):
            raise InputError(f"{method.name}: {len(models)} state dicts but statistics for {len(self._given)}")
        names = {name for one in self._given for name in one}
        for i, one in enumerate(self._given):
            if getattr(one, "kind", method.needs_data) != method.needs_data:
                raise InputError(f"{method.name} takes {method.needs_data} statistics, model {i} brings another kind")
            if odd := sorted(names - set(one)):
                raise InputError(f"{method.name}: no statistic of {odd[0]!r} for model {i}, another model has one")
            for name, tensor in one.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise InputError(f"{method.name}: the statistic of {name!r} for model {i} holds NaN or Inf")
        if odd := sorted(names - set(models[0])):
            raise InputError(f"{method.name}: a statistic of {odd[0]!r}, which the state dicts do not have")
        if method.needs_data is not None and not names:
            raise InputError(f"{method.name}: the statistics hold nothing; collect them again")

    def of(self, name: str, device: torch.device) -> list[Tensor] | None:
        """One statistic a model, or None."""
        found = bool(self._given) and name in self._given[0]
        return [one[name].to(device) for one in self._given] if found else None

    def inputs_first(self, name: str) -> bool:
        """Whether the statistics say that a weight is stored [in, out]."""
        return any(name in getattr(one, "inputs_first", ()) for one in self._given)


def _check_tensor(tensor: Tensor, is_float: bool, where: str) -> None:
    if tensor.is_complex():
        raise InputError(f"{where} is complex: merge its real and imaginary parts as tensors of their own")
    if tensor.is_floating_point() != is_float:
        raise InputError(f"{where} is {tensor.dtype}, in the first state dict it is {'' if is_float else 'not '}float")
    if is_float and not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{where} holds NaN or Inf")


def _storage(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """Equal for two names that are one tensor in every model; unique for tensors without elements."""
    return tuple((t.data_ptr() or id(t), t.shape, t.stride()) for t in tensors)
