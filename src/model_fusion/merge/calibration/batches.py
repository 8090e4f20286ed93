"""Batches of any form, and what a module answers to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError

Forward = Callable[[nn.Module, Any], Any]
"""(module, batch) → its answer: logits [..., C], or an object with `logits`."""


def call(module: nn.Module, batch: Any) -> Any:
    """The default: a mapping is given by name, a tuple or list by position, anything else alone."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


def one_each(forward: Forward | Sequence[Forward] | None, count: int) -> list[Forward]:
    """A forward for each of `count` models or tasks."""
    if forward is None or callable(forward):
        return [forward or call] * count
    if len(forward) != count:
        raise InputError(f"{len(forward)} forwards for {count} sets of batches: give one, or one each")
    return list(forward)


def mask_of(batch: Any) -> Tensor | None:
    """bool [B, T] of a mapping's `attention_mask`: padding is not data."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def logits_of(answer: Any) -> Tensor:
    """float [..., C]. Raises InputError for an answer without logits."""
    found = getattr(answer, "logits", answer)
    if not isinstance(found, Tensor) or found.dim() < 2 or not found.is_floating_point():
        raise InputError("the module's answer holds no logits [..., classes]: give forward=, which returns them")
    return found


def samples(batch: Any) -> Iterator[Any]:
    """The batch's rows, each as a batch of one."""
    if isinstance(batch, Mapping):
        parts = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        for i in range(_size(parts.values())):
            yield {**batch, **{name: value[i : i + 1] for name, value in parts.items()}}
    elif isinstance(batch, tuple | list):
        for i in range(_size(batch)):
            yield tuple(part[i : i + 1] for part in batch)
    else:
        for i in range(_size([batch])):
            yield batch[i : i + 1]


def _size(parts: Any) -> int:
    sizes = {len(part) for part in parts if isinstance(part, Tensor) and part.dim()}
    if len(sizes) != 1:
        raise InputError("a batch's tensors must have one length, the number of its samples")
    return int(sizes.pop())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, and with what each part of the module was before put back."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


def check_finite(tensor: Tensor, what: str) -> None:
    """Raises InputError."""
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{what} holds NaN or Inf: check the model and its inputs, or compute in float32")
