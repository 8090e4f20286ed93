"""The routers and experts of a loaded mixed model, found by module; and ways to overrule the routers for a while.

Needs transformers 5 or newer, whose MoE blocks share one shape: a router returning (logits, weights, indices) and
experts whose parameters are stacked [E, …].
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError
from model_fusion.mix.families import FAMILIES, Family


@dataclass(frozen=True)
class MoELayer:
    """One mixed layer: its number, its router and its experts."""

    number: int
    router: Any
    experts: Any


def family_of(model_type: object) -> Family:
    """The table of a mixed model. Raises `InputError` for any other model."""
    if model_type not in FAMILIES:
        raise InputError(f"{model_type} is no mixture that this toolkit builds; expected {', '.join(FAMILIES)}")
    return FAMILIES[str(model_type)]


def moe_layers(model: Any) -> list[MoELayer]:
    """Every mixed layer of a loaded model."""
    family = family_of(model.config.model_type)
    found = []
    for number, layer in enumerate(model.model.layers):
        for path in family.routers:
            owner = path.rpartition(".")[0]
            block = layer.get_submodule(owner) if _has(layer, owner) else None
            if block is not None and hasattr(block, "experts"):
                found.append(MoELayer(number, layer.get_submodule(path), block.experts))
                break
    if not found:
        raise InputError("the model has no mixed layer")
    return found


def _has(layer: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in layer.named_modules())


@contextmanager
def replaced(layers: Sequence[MoELayer], decide: Callable[[int, Tensor], tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside the block, layer i's router answers decide(i, inputs [N, H]) → (weights [N, k], indices [N, k])."""

    def forward(i: int) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        def answer(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            flat = hidden.reshape(-1, hidden.shape[-1])
            weights, indices = decide(i, flat)
            return torch.zeros(len(flat), layers[i].router.weight.shape[0]), weights.to(hidden.dtype), indices

        return answer

    for i, layer in enumerate(layers):
        layer.router.forward = forward(i)
    try:
        yield
    finally:
        for layer in layers:
            del layer.router.forward


def fixed(weights: Sequence[float]) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
    """The same experts with the same weights for every token: one-hot forces one, equal ones are gateless."""
    chosen = [i for i, w in enumerate(weights) if w]
    values, indices = torch.tensor([weights[i] for i in chosen]), torch.tensor(chosen)

    def decide(number: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return values.expand(len(inputs), -1), indices.expand(len(inputs), -1)

    return decide


@contextmanager
def souped(layers: Sequence[MoELayer]) -> Iterator[None]:
    """Inside the block every token goes through the average of the experts' weights."""
    stacked = [p.data for layer in layers for p in layer.experts.parameters()]  # each [E, …]
    kept = [p[0].clone() for p in stacked]
    for p in stacked:
        p[0].copy_(p.mean(0))
    try:
        with replaced(layers, fixed([1.0])):
            yield
    finally:
        for p, first in zip(stacked, kept, strict=True):
            p[0].copy_(first)


@contextmanager
def top_k(layers: Sequence[MoELayer], count: int) -> Iterator[None]:
    """Inside the block `count` experts run for a token (all of them: soft routing)."""
    before = [layer.router.top_k for layer in layers]
    for layer in layers:
        layer.router.top_k = count
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.router.top_k = old


@contextmanager
def watched(layers: Sequence[MoELayer], see: Callable[[int, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls see(i, inputs [N, H], logits [N, E], indices [N, k]) at every use of layer i's router."""

    def hook(i: int) -> Any:
        def after(module: nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, Tensor, Tensor]) -> None:
            see(i, args[0].reshape(-1, args[0].shape[-1]), out[0], out[2])

        return after

    handles = [layer.router.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
