"""Which output tensors a recipe asks for, and from which tensors of which models each is made.

Three forms of recipe become one list: whole models, slices of layers, and modules that are either. Knows names and
layers, no dtype and no method.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from model_fusion.architecture.align import known_modules, module
from model_fusion.architecture.roles import before_layers, depth_of, main_stack, role_of, stacks, with_layer
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.recipe.merge import MergeRecipe, ModelEntry, Module, Parameters, Slice, SliceSource
from model_fusion.recipe.reading import nearest


@dataclass(frozen=True)
class Block:
    """Some models, the base they differ from, and the parameter levels that apply to each, most specific first."""

    sources: Sequence[ModelEntry | SliceSource]
    levels: Sequence[Parameters]
    base: str | None


@dataclass(frozen=True)
class Item:
    """One output tensor: made from `names[i]` of `block.sources[i]`, or copied from the template (no block).
    `position` in [0, 1] is its layer's place in the stack."""

    out: str
    name: str
    block: Block | None
    names: tuple[str, ...]
    position: float


Part = MergeRecipe | Module


class Layout:
    """`items`, and `picks`: the (model, layer) of each output layer of the main stack, where it was sliced."""

    def __init__(
        self,
        recipe: MergeRecipe,
        checkpoints: dict[str, Checkpoint],
        template: str,
        left_out: Iterable[str],
    ) -> None:
        """`left_out`: tensors that are not written (tied heads, computed buffers)."""
        self.items: list[Item] = []
        self.picks: list[tuple[str, int]] | None = None
        self.problems: list[str] = []
        self._recipe, self._checkpoints, self._template = recipe, checkpoints, template
        self._left_out = set(left_out)
        self._names = [name for name in checkpoints[template].names if name not in self._left_out]
        self._lengths = stacks(self._names)
        if recipe.modules is None:
            self._part(recipe, self._names, [recipe.parameters])
        else:
            self._modules(recipe.modules)

    def _modules(self, modules: dict[str, Module]) -> None:
        owner: dict[str, str] = {}
        for key, part in modules.items():
            names = module(key, self._names)
            if not names:
                valid = known_modules(self._names)
                self.problems.append(f"module {key!r} names no tensor of {self._template}; {nearest(key, valid)}")
            taken = next((owner[name] for name in names if name in owner), None)
            if taken is not None:
                self.problems.append(f"modules {taken!r} and {key!r} share tensors")
                continue
            owner.update(dict.fromkeys(names, key))
            self._part(part, names, [part.parameters, self._recipe.parameters])
        for name in self._names:
            if name not in owner:
                self.items.append(Item(name, name, None, (), 0.0))

    def _part(self, part: Part, names: Sequence[str], levels: Sequence[Parameters]) -> None:
        if part.slices is not None:
            self._slices(part.slices, names, levels)
            return
        block = Block(part.models or [], levels, self._recipe.base_model)
        for name in names:
            self.items.append(Item(name, name, block, (name,) * len(block.sources), depth_of(name, self._lengths)))

    def _slices(self, parts: Sequence[Slice], names: Sequence[str], levels: Sequence[Parameters]) -> None:
        found = main_stack(names)
        if found is None:
            self.problems.append(f"{self._template} has no layers to slice")
            return
        stack = found[0]
        # what stands before the layers goes with the first slice, what follows them with the last, as in mergekit
        first, last = parts[0].sources, parts[-1].sources
        for name in names:
            if role_of(name).stack != stack:
                early = before_layers(name)
                part_levels = [parts[0 if early else -1].parameters, *levels]
                block = Block(first if early else last, part_levels, self._base(parts[0 if early else -1]))
                self.items.append(Item(name, name, block, (name,) * len(block.sources), 0.0 if early else 1.0))
        picks: list[tuple[str, int]] = []
        for part in parts:
            self._slice(part, stack, [part.parameters, *levels], picks)
        if found == main_stack(self._names):
            self.picks = picks

    def _base(self, part: Slice) -> str | None:
        return part.base_model or self._recipe.base_model

    def _slice(self, part: Slice, stack: str, levels: Sequence[Parameters], picks: list[tuple[str, int]]) -> None:
        layers: list[list[list[str]]] = []
        for source in part.sources:
            own = self._checkpoints[source.model].names
            inside = _by_layer([name for name in own if name not in self._left_out], stack)
            if source.layer_range[1] > len(inside):
                text = f"layer_range {list(source.layer_range)}: {source.model} has {len(inside)} layers"
                self.problems.append(text)
                return
            layers.append(inside)
        starts = [source.layer_range[0] for source in part.sources]
        count = part.sources[0].layer_range[1] - starts[0]
        block = Block(part.sources, levels, self._base(part))
        for i in range(count):
            new = len(picks)
            picks.append((part.sources[0].model, starts[0] + i))
            for name in layers[0][starts[0] + i]:
                names = tuple(with_layer(name, start + i) for start in starts)
                self.items.append(Item(with_layer(name, new), name, block, names, i / max(count - 1, 1)))


def _by_layer(names: Iterable[str], stack: str) -> list[list[str]]:
    found: dict[int, list[str]] = {}
    for name in names:
        role = role_of(name)
        if role.stack == stack and role.layer is not None:
            found.setdefault(role.layer, []).append(name)
    return [found.get(i, []) for i in range(max(found, default=-1) + 1)]
