"""A merge that stays in memory: what a search tries and throws away. Hashes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from model_fusion.checkpoint.views import Planned
from model_fusion.errors import InputError
from model_fusion.merge.execute import Run
from model_fusion.merge.plan import MergePlan


class Held(Planned):
    """A merged model in memory; `tensors` are what a checkpoint of it would hold, in the dtypes it would have."""

    def __init__(self, name: str, work: MergePlan, tensors: dict[str, Tensor]) -> None:
        super().__init__(name, [item.spec for item in work.outputs], work.config, work.files)
        self.tensors = tensors

    def same(self, first: str, second: str) -> bool:
        return torch.equal(self.tensors[first], self.tensors[second])

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def stored(self, name: str) -> dict[str, Tensor]:
        return {name: self.tensors[name]}


class _Memory:
    """Takes what a writer takes."""

    def __init__(self, work: MergePlan) -> None:
        self.done: dict[str, str] = {}
        self.tensors = {item.spec.name: torch.empty(item.spec.shape, dtype=item.spec.dtype) for item in work.outputs}

    def write_parts(self, name: str, parts: Iterable[Tensor], inputs: Mapping[str, str] | None = None) -> str:
        flat, start = self.tensors[name].view(-1), 0
        for part in parts:  # each overwrites the one before: copied at once
            flat[start : start + part.numel()] = part
            start += part.numel()
        if start != flat.numel():
            raise InputError(f"tensor {name!r}: planned {flat.numel()} elements, got {start}")
        return ""


def hold(name: str, work: MergePlan, threads: int, device: str = "cpu") -> Held:
    """Carry out a plan without its `stages`."""
    memory = _Memory(work)
    order = sorted(work.outputs, key=lambda item: -item.spec.nbytes)
    Run(work, memory, False, device, hashed=False).all(order, threads)
    return Held(name, work, memory.tensors)
