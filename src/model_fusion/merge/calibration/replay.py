"""Blocks that each run once on the answer of the one before: run one at a time, from what the last one answered.

A full pass for each of L layers costs L/2 passes over the data; replaying costs two.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_fusion.merge.calibration.batches import Forward


@dataclass(frozen=True)
class _Call:
    """What a block was given beside the first argument, which is handed on from block to block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Replay:
    """For each model and batch, the calls of its blocks and the tensor that enters the next one."""

    def __init__(self, models: Sequence[nn.Module], paths: Sequence[str]) -> None:
        self.models, self.paths = models, paths
        self.calls: list[list[list[_Call]]] = []
        self.hidden: list[list[Tensor]] = []

    @classmethod
    def record(
        cls,
        models: Sequence[nn.Module],
        forwards: Sequence[Forward],
        batches: Sequence[Sequence[Any]],
        paths: Sequence[str],
    ) -> Replay | None:
        """One full pass of each batch; None where the blocks do more than hand one tensor on (then nothing is known
        of what they would do to another one)."""
        found = cls(models, paths)
        for model, forward, own in zip(models, forwards, batches, strict=True):
            calls, entries = [], []
            for batch in own:
                chain = _chain(model, forward, batch, paths)
                if chain is None:
                    return None
                calls.append(chain[0])
                entries.append(chain[1])
            found.calls.append(calls)
            found.hidden.append(entries)
        return found

    def run(self, number: int, block: int) -> Generator[Tensor, None, None]:
        """The block's answers of model `number`, batch by batch."""
        part = self.models[number].get_submodule(self.paths[block])
        for calls, hidden in zip(self.calls[number], self.hidden[number], strict=True):
            yield _first(part(hidden, *calls[block].args, **calls[block].kwargs))

    def advance(self, block: int) -> None:
        """The block is merged now: what it answers enters the next one."""
        self.hidden = [list(self.run(number, block)) for number in range(len(self.models))]


@torch.no_grad()
def _chain(model: nn.Module, forward: Forward, batch: Any, paths: Sequence[str]) -> tuple[list[_Call], Tensor] | None:
    """The calls of the blocks, and what enters the first."""
    given: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = []
    answers: list[Any] = []
    handles = []
    for number, path in enumerate(paths):
        part = model.get_submodule(path)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int = number) -> None:
            given.append((number, args, kwargs))

        handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(part.register_forward_hook(lambda _m, _a, answer: answers.append(answer)))
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if [number for number, _, _ in given] != list(range(len(paths))) or len(answers) != len(paths):
        return None
    handed = [_first(answer) for answer in answers]
    made = {id(t) for answer in answers for t in _tensors(answer) or ()}
    for i, (_, args, kwargs) in enumerate(given):
        others = _tensors((args[1:], kwargs))
        if not args or not isinstance(args[0], Tensor) or others is None or any(id(t) in made for t in others):
            return None
        if i and args[0] is not handed[i - 1]:
            return None
    return [_Call(args[1:], kwargs) for _, args, kwargs in given], given[0][1][0]


def _first(answer: Any) -> Any:
    return answer[0] if isinstance(answer, tuple) else answer


def _tensors(value: Any) -> list[Tensor] | None:
    """All tensors in it; None where something in it may change from call to call (a cache)."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        parts = [_tensors(part) for part in value]
        return None if None in parts else [t for part in parts for t in part or ()]
    return [] if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device) else None
