"""The linear layers of any module, and the Gram matrices of what they receive, through hooks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_fusion.checkpoint.statistics import Statistics
from model_fusion.errors import InputError
from model_fusion.merge.calibration.batches import check_finite


@dataclass(frozen=True)
class Layer:
    """One weight that acts as a matrix on inputs.

    **Arguments**
    name: the weight's name in the state dict. modules: those that use it (several, where it is shared).
    inputs_first: stored [in, out] as in transformers' Conv1D. width: number of inputs.
    """

    name: str
    modules: tuple[nn.Module, ...]
    inputs_first: bool
    width: int


def linear_layers(module: nn.Module) -> list[Layer]:
    """Every nn.Linear, every ungrouped nn.Conv2d, and transformers' Conv1D, in the order of the state dict.

    A weight that another kind of module uses too is left out: what an embedding reads is not described by XᵀX.
    """
    users: dict[int, list[nn.Module]] = {}
    names: dict[int, str] = {}
    for path, part in module.named_modules():
        for name, weight in part.named_parameters(recurse=False, remove_duplicate=False):
            users.setdefault(id(weight), []).append(part)
            names.setdefault(id(weight), f"{path}.{name}" if path else name)
    found = []
    for key, parts in users.items():
        kinds = {_kind(part) for part in parts if getattr(part, "weight", None) is not None}
        if len(kinds) != 1 or None in kinds or any(id(getattr(part, "weight", None)) != key for part in parts):
            continue
        weight = parts[0].get_parameter("weight")
        first = kinds == {"conv1d"}
        width = weight.shape[0] if first else weight[0].numel()
        found.append(Layer(names[key], tuple(parts), first, width))
    return found


def _kind(part: nn.Module) -> str | None:
    if isinstance(part, nn.Linear):
        return "linear"
    if isinstance(part, nn.Conv2d) and part.groups == 1 and part.padding_mode == "zeros":
        return None if isinstance(part.padding, str) else "conv2d"
    # transformers' class, by its name: nothing here imports transformers
    return "conv1d" if type(part).__name__ == "Conv1D" and hasattr(part, "nf") else None


class Grams:
    """While entered, adds up x xᵀ over what the layers receive. Memory: one matrix a layer.

    float32 (float64 where the inputs are). `mask`, bool [B, T], leaves out rows of inputs [B, T, in].
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = list(layers)
        self.mask: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for layer in self.layers:
            for part in layer.modules:
                hook = self._hook(layer)
                self._handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, layer: Layer) -> Any:
        def keep(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._add(layer, part, args[0] if args else next(iter(kwargs.values())))

        return keep

    def _add(self, layer: Layer, part: nn.Module, x: Tensor) -> None:
        x = x.detach()
        if isinstance(part, nn.Conv2d):
            padding = (part.padding, part.padding) if isinstance(part.padding, int) else tuple(map(int, part.padding))
            x = F.unfold(x, part.kernel_size, part.dilation, padding, part.stride).transpose(1, 2)
        elif self.mask is not None and x.shape[:-1] == self.mask.shape:
            x = x[self.mask.to(x.device)]
        rows = x.reshape(-1, layer.width)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        total = self._sums.get(layer.name)
        if total is None:
            total = self._sums[layer.name] = rows.new_zeros(layer.width, layer.width)
        total.addmm_(rows.T, rows)
        self._counts[layer.name] = self._counts.get(layer.name, 0) + len(rows)

    def statistics(self, **about: Any) -> Statistics:
        """The means of x xᵀ. Raises InputError for NaN. What was added up is given away."""
        found, unseen = {}, []
        for layer in self.layers:
            if not self._counts.get(layer.name):
                unseen.append(layer.name)
                continue
            found[layer.name] = self._sums.pop(layer.name).div_(self._counts[layer.name]).cpu()
            check_finite(found[layer.name], f"what {layer.name!r} receives")
        first = frozenset(layer.name for layer in self.layers if layer.inputs_first and layer.name in found)
        return Statistics("gram", found, max(self._counts.values(), default=0), first, tuple(unseen), about)


def check_layers(layers: list[Layer], module: nn.Module) -> None:
    """Raises InputError where there is nothing to hook."""
    if not layers:
        raise InputError(f"{type(module).__name__} has no linear layer of its own; a Gram matrix needs one")
