"""RegMean++: Gram matrices of what the MERGED model hands on, layer by layer (Nguyen et al. 2025).

The result is statistics like any other: merging with plain `regmean` and the same alpha and weights gives the model
that the activations went through.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from model_fusion.architecture.roles import role_of
from model_fusion.checkpoint.statistics import Statistics
from model_fusion.errors import InputError
from model_fusion.merge.calibration.batches import Forward, evaluating, mask_of, one_each
from model_fusion.merge.calibration.layers import Grams, Layer, check_layers, linear_layers
from model_fusion.merge.calibration.replay import Replay
from model_fusion.merge.methods import merge_state_dicts


class _Enough(Exception):
    """All inputs of the layers in question have been seen."""


def collect_merged_statistics(
    models: Sequence[nn.Module],
    batches: Sequence[Sequence[Any]],
    *,
    forward: Forward | Sequence[Forward] | None = None,
    weights: Sequence[float] | None = None,
    alpha: float = 0.9,
    ridge: float = 1e-6,
    step: Callable[[int], object] = lambda total: None,
) -> list[Statistics]:
    """Gram statistics of each model, taken where everything before a layer is merged already.

    A layer is a numbered part of a stack ("layers.3", "h.3", "blocks.3"), else a single module with weights. Layers are
    merged in the order in which they first run; inside a layer, a model's own weights act, as in the paper.

    **Arguments**
    models: of one architecture; they are not changed. batches, forward: of each model (`collect_statistics` says what
        they may be). Where layers hand one tensor on, as transformers' do without a cache (`use_cache: False`), they
        are replayed: two passes in all; else one pass a layer, as far as that layer.
    weights, alpha, ridge: those of the `regmean` merge that follows.
    step: called with the number of layers after each.

    Memory: one copy of each model, and one matrix [in, in] a linear layer and model.

    **Raises** InputError where models, batches and weights differ in number, or tensors do not fit.
    """
    if len(models) != len(batches) or not models:
        raise InputError(f"{len(models)} models but batches for {len(batches)}: give each model its own")
    if not all(batches):
        raise InputError("a model has no batches to collect statistics from")
    each = [{"weight": weight} for weight in weights] if weights is not None else None
    walk = _Walk([deepcopy(model) for model in models], batches, one_each(forward, len(models)))
    about = {"merged": True, "alpha": alpha}
    found: list[dict[str, Tensor]] = [{} for _ in models]
    counts, first, unseen = [0] * len(models), set[str](), set[str]()
    for number, unit in enumerate(walk.units):
        grams = walk.grams(number) if unit.layers else []
        for held, own in zip(found, grams, strict=bool(grams)):
            held |= own
        counts = [max(n, own.count) for n, own in zip(counts, grams, strict=True)] if grams else counts
        first |= {name for own in grams for name in own.inputs_first}
        unseen |= {name for own in grams for name in own.unseen}
        seen = set.intersection(*(set(own) for own in grams)) if grams else set()
        walk.merge(unit.names, [{n: own[n] for n in sorted(seen)} for own in grams], each, alpha, ridge, first)
        walk.done(number)
        step(len(walk.units))
    common = set.intersection(*(set(held) for held in found))
    if not common:
        raise InputError("no linear layer received anything: check the batches and forward=")
    kept = [{name: tensor for name, tensor in held.items() if name in common} for held in found]
    odd = tuple(sorted(unseen))
    return [Statistics("gram", o, n, frozenset(first), odd, about) for o, n in zip(kept, counts, strict=True)]


class _Unit:
    """Parts that are merged together. parts: paths of modules with tensors of their own; block: the module that holds
    them, where they are a numbered layer; names: of those tensors; layers: their linear layers; until: the module whose
    start ends a forward pass, if nothing of the unit follows."""

    def __init__(self, parts: list[str], block: str | None) -> None:
        self.parts, self.block = parts, block
        self.names: list[str] = []
        self.layers: list[str] = []
        self.until: str | None = None


class _Walk:
    """Copies of the models on their way to being one."""

    def __init__(self, models: list[nn.Module], batches: Sequence[Sequence[Any]], forwards: list[Forward]) -> None:
        self.models, self.batches, self.forwards = models, batches, forwards
        layers = linear_layers(models[0])
        check_layers(layers, models[0])
        with evaluating(models[0]), torch.no_grad():
            ran = _order(models[0], forwards[0], batches[0][0])
        self.units = _units(ran, models[0])
        blocks = [number for number, unit in enumerate(self.units) if unit.block is not None]
        # an unbroken run of layers, of one stack
        stacks = {str(self.units[number].block).rpartition(".")[0] for number in blocks}
        self._chain = range(0)
        if len(stacks) == 1 and len(blocks) > 1 and blocks == list(range(blocks[0], blocks[-1] + 1)):
            self._chain = range(blocks[0], blocks[-1] + 1)
        self._replay: Replay | None = None
        states = models[0].state_dict(keep_vars=True)
        done: set[int] = set()
        for unit in self.units:
            for path in unit.parts:
                part = models[0].get_submodule(path)
                local = [n for n, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))]
                names = [f"{path}.{n}" if path else n for n in local]
                unit.names += [n for n in names if n in states and id(states[n]) not in done]
                done |= {id(states[n]) for n in unit.names}
            unit.layers = [layer.name for layer in layers if layer.name in unit.names]

    def grams(self, number: int) -> list[Statistics]:
        """Of each model, for the linear layers of a unit."""
        if self._chain and number == self._chain.start:
            paths = [str(self.units[n].block) for n in self._chain]
            with ExitStack() as all_:
                for model in self.models:
                    all_.enter_context(evaluating(model))
                self._replay = Replay.record(self.models, self.forwards, self.batches, paths)
        unit, found = self.units[number], []
        for i, (model, batches) in enumerate(zip(self.models, self.batches, strict=True)):
            wanted: list[Layer] = [layer for layer in linear_layers(model) if layer.name in unit.layers]
            with evaluating(model), Grams(wanted) as grams, torch.no_grad():
                block = number - self._chain.start
                with closing(self._full(i, unit) if self._replay is None else self._replay.run(i, block)) as passes:
                    for batch in batches:
                        grams.mask = mask_of(batch)
                        next(passes)
            found.append(grams.statistics())
        return found

    def _full(self, number: int, unit: _Unit) -> Generator[None, None, None]:
        """Passes of one model's batches, as far as the unit."""
        model, forward = self.models[number], self.forwards[number]
        with _until(model, unit.until):
            for batch in self.batches[number]:
                with suppress(_Enough):
                    forward(model, batch)
                yield

    def done(self, number: int) -> None:
        """A unit is merged: the next one sees what it answers."""
        if self._replay is None or number not in self._chain:
            return
        with ExitStack() as all_, torch.no_grad():
            for model in self.models:
                all_.enter_context(evaluating(model))
            self._replay.advance(number - self._chain.start)
        if number == self._chain[-1]:
            self._replay = None

    def merge(
        self,
        names: list[str],
        grams: list[dict[str, Tensor]],
        each: list[dict[str, float]] | None,
        alpha: float,
        ridge: float,
        inputs_first: set[str],
    ) -> None:
        """Put the merged tensors of these names into every copy."""
        states = [{n: t for n, t in model.state_dict().items() if n in names} for model in self.models]
        if not names:
            return
        if any(grams):
            data = [Statistics("gram", own, 1, frozenset(inputs_first)) for own in grams]
            merged = merge_state_dicts("regmean", states, model_params=each, statistics=data, alpha=alpha, ridge=ridge)
        else:
            merged = merge_state_dicts("linear", states, model_params=each)
        with torch.no_grad():
            for state in states:
                for name, tensor in merged.items():
                    state[name].copy_(tensor)


def _order(model: nn.Module, forward: Forward, batch: Any) -> list[str]:
    """Paths of the modules with tensors of their own, once for each time that they run."""
    ran: list[str] = []
    handles = []
    for path, part in model.named_modules():
        if any(True for _ in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
            handles.append(part.register_forward_pre_hook(lambda _m, _a, path=path: ran.append(path)))
    try:
        forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def _units(ran: list[str], model: nn.Module) -> list[_Unit]:
    """In the order of their first runs. Where units run one after another, a pass may end when the next one starts."""
    units: dict[str, _Unit] = {}
    sequence = []
    for path in ran:
        block = _block(path)
        unit = units.setdefault(block or path, _Unit([], block))
        unit.parts += [path] * (path not in unit.parts)
        sequence.append(list(units).index(block or path))
    for path, _ in model.named_modules():  # parts of a layer that may run on other batches: experts
        block = _block(path)
        if block in units and path not in units[block].parts:
            units[block].parts.append(path)
    if sequence == sorted(sequence):
        for unit, after in pairwise(units.values()):
            unit.until = after.parts[0]
    return list(units.values())


def _block(path: str) -> str | None:
    """`model.layers.3` of `model.layers.3.mlp.up_proj`; None outside of numbered layers."""
    role = role_of(path + ".weight")
    return None if role.layer is None else f"{role.stack}.{role.layer}"


@contextmanager
def _until(model: nn.Module, path: str | None) -> Iterator[None]:
    def stop(_: nn.Module, __: Any) -> None:
        raise _Enough

    handle = None if path is None else model.get_submodule(path).register_forward_pre_hook(stop)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
