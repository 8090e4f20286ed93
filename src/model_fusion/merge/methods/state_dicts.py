"""Merging the state dicts of any PyTorch modules, without files or recipes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model_fusion.architecture.roles import depth_of, rows_of, stacks
from model_fusion.errors import InputError
from model_fusion.merge.findings import unequal
from model_fusion.merge.methods.base import Key, build, get
from model_fusion.merge.methods.blocks import delta_blocks, delta_square, sizes
from model_fusion.merge.methods.selection import Cut, cuts
from model_fusion.merge.methods.ties import kept


def global_cuts(tensors: Sequence[tuple[Tensor, Tensor]], density: float) -> list[Cut]:
    """One cut a tensor that together keep max(1, int(d·N)) of all (model, base) pairs' largest |δ|.

    Equal magnitudes at the threshold are kept by the tensors' order, then by flat index.
    """
    blocks = [(pair, i) for pair in tensors for i in range(len(sizes(pair[0].numel())))]
    lengths = [n for pair in tensors for n in sizes(pair[0].numel())]

    def block(i: int, step: int) -> Tensor:
        (model, base), number = blocks[i]
        return delta_blocks(model, base)(number, step)

    whole = cuts(block, lengths, [kept(density, sum(lengths))])[0]
    out, offset = [], 0
    for model, _ in tensors:
        out.append(Cut(whole.threshold, whole.last - offset))
        offset += model.numel()
    return out


def merge_state_dicts(
    method: str,
    state_dicts: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    model_params: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    depth: Mapping[str, float] | None = None,
    **params: Any,
) -> dict[str, Tensor]:
    """Merges tensors of equal names, float32 inside, each written in the first dict's dtype.

    Integer and bool tensors are taken from the first dict. Names that share one tensor in every dict (tied weights)
    share the result. BatchNorm's running statistics are merged like weights: re-estimate them on data afterwards,
    most of all after task-vector methods, which can make a variance negative.

    **Arguments**
    model_params: one mapping a model (weight, density …); params: the method's own (normalize, …).
    depth: where each tensor's layer lies, 0 first to 1 last (`lines` needs it); without it, from names that count their
        layers ("layers.3.…", "h.3.…", "blocks.3.…").

    Warns where the method wants task vectors of about equal length and they are not.

    **Raises** InputError where names, shapes, dtypes, parameters or the base do not fit, or values are NaN or Inf.
    """
    chosen = get(method)
    if not state_dicts:
        raise InputError(f"{method}: no state dicts given")
    own = build(chosen.params, params, method)
    each = [build(chosen.model_params, dict(p), method) for p in (model_params or [{}] * len(state_dicts))]
    if len(each) != len(state_dicts):
        raise InputError(f"{method}: {len(state_dicts)} state dicts but parameters for {len(each)}")
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
    model_cuts: list[dict[str, Cut]] | None = None
    if getattr(own, "trim", "tensor") == "global":
        if base is None:
            raise InputError(f"{method} needs a base model: give base=")
        model_cuts = [
            dict(zip(floats, global_cuts([(d[n], base[n]) for n in floats], p.density), strict=True))
            for d, p in zip(state_dicts, each, strict=True)
        ]
    lengths = stacks(names)
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
            depth=(depth_of(name, lengths) if lengths else None) if depth is None else depth.get(name),
            rows=rows_of(name),
        )
        with torch.no_grad():
            merged = chosen.run([d[name] for d in state_dicts], None if base is None else base[name], each, own, key)
        out[name] = merged.to(own_tensor.dtype)
        if chosen.equal_norms and base is not None:
            for i, (one, own_params) in enumerate(zip(state_dicts, each, strict=True)):
                squares[i] += own_params.weight**2 * delta_square(one[name].detach(), base[name].detach())
    for text in unequal({f"state dict {i}": math.sqrt(square) for i, square in enumerate(squares)}):
        warnings.warn(f"{method}: {text}", stacklevel=2)
    return out


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
