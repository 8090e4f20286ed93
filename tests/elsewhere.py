"""A second device without one: tensors put there are plain ones, watched so that nothing mixes them with the CPU's.

What CUDA refuses is refused: an operation on tensors of two places (0-dimensional ones excepted), numpy on a tensor
that is there, a CPU generator for one that is there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

DEVICE = torch.device("cuda:0")
_BOTH = ("copy_", "__getitem__", "__setitem__")


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Elsewhere(TorchFunctionMode):
    """Use as a context manager; `tensor.to(DEVICE)` puts a tensor there, `.cpu()` fetches it. `moved` counts."""

    def __init__(self) -> None:
        super().__init__()
        self._there: Any = WeakIdKeyDictionary()
        self.moved = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        there = [t for t in _tensors((args, given)) if t in self._there]
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return DEVICE if there else func(*args)
        if name == "cpu":
            return func(*args).clone() if there else func(*args)
        target = given.get("device") or next((a for a in args if isinstance(a, torch.device)), None)
        if target is not None and torch.device(target) == DEVICE:
            if given.get("generator") is not None:
                raise RuntimeError("a generator of the CPU cannot draw elsewhere")
            args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
            given = {key: "cpu" if key == "device" else value for key, value in given.items()}
            made = func(*args, **given)
            self.moved += 1
            return self._mark(made.clone() if name == "to" else made)
        if there:
            self._check(name, args, given)
        made = func(*args, **given)
        stays = name == "copy_" and args[0] not in self._there
        return made if stays or not there else self._mark(made)

    def _check(self, name: str, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if name in ("numpy", "__array__", "data_ptr"):
            raise TypeError(f"{name} of a tensor that is elsewhere")
        here = [t for t in _tensors((args, given)) if t not in self._there and t.dim() > 0]
        if here and (name not in _BOTH or (name != "copy_" and args[0] not in self._there)):
            raise RuntimeError(f"{name}: tensors of two devices, here {[tuple(t.shape) for t in here]}")

    def _mark(self, made: Any) -> Any:
        for tensor in _tensors(made):
            self._there[tensor] = True
        return made
