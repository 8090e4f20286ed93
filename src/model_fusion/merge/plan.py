"""From a recipe and opened checkpoints to a list of output tensors. Reads headers and configs.

Every problem is collected, so that a user sees all of them at once and before any byte is written.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from model_fusion.architecture.roles import (
    before_layers,
    main_stack,
    role_of,
    stacked_config,
    tied,
    with_layer,
)
from model_fusion.checkpoint.formats import TensorSpec
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.vocabulary import vocabulary
from model_fusion.errors import InputError
from model_fusion.recipe.merge import MergeRecipe, ModelEntry, Parameters, SliceSource, nearest
from model_fusion.recipe.parameters import evaluate, filters_of

# mergekit options that change its memory use, not the result
_WITHOUT_EFFECT = {"int8_mask"}


class Method(Protocol):
    """What planning must know of a merge method; the registry's entries fit."""

    @property
    def name(self) -> str: ...
    @property
    def sees(self) -> str: ...
    @property
    def params(self) -> Any: ...
    @property
    def model_params(self) -> Any: ...
    @property
    def needs_base(self) -> str: ...
    @property
    def min_models(self) -> int: ...
    @property
    def max_models(self) -> int | None: ...
    @property
    def stream(self) -> Any: ...


@dataclass(frozen=True)
class Input:
    """One tensor of one model."""

    model: str
    tensor: str


@dataclass(frozen=True)
class Output:
    """One tensor to make. `copied` tensors (integers, buffers) are taken from the first input as they are."""

    spec: TensorSpec
    inputs: tuple[Input, ...]
    base: Input | None
    model_params: tuple[Any, ...]
    params: Any
    copied: bool = False


@dataclass(frozen=True)
class MergePlan:
    """What `engine` executes. `template` is the model whose config and tokenizer the output gets."""

    recipe: MergeRecipe
    method: Method
    checkpoints: dict[str, Checkpoint]
    template: str
    outputs: list[Output]
    config: dict[str, Any]


@dataclass(frozen=True)
class _Block:
    """Some models and the parameter levels that apply to each, most specific first."""

    sources: Sequence[ModelEntry | SliceSource]
    levels: Sequence[Parameters]


def check_parameters(recipe: MergeRecipe, method: Method) -> None:
    """Names of parameters against the method's own, before any model is looked for."""
    own = [*_names(method.params), *_names(method.model_params)]
    valid = {*(name.removesuffix("_") for name in own), *_WITHOUT_EFFECT}
    parts = [recipe, *(recipe.models or []), *(recipe.slices or [])]
    parts += [source for part in recipe.slices or [] for source in part.sources]
    for part in parts:
        for name in part.parameters:
            if name not in valid:
                raise InputError(f"{recipe.merge_method} has no parameter {name!r}; {nearest(name, valid)}")


def build(recipe: MergeRecipe, method: Method, checkpoints: dict[str, Checkpoint]) -> MergePlan:
    """The plan, or one `InputError` that lists every problem."""
    names = recipe.model_names()
    template = recipe.base_model or names[0]
    planner = _Planner(recipe, method, checkpoints, template)
    planner.run()
    if planner.problems:
        shown = planner.problems[:50]
        more = len(planner.problems) - len(shown)
        lines = "; ".join(shown) + (f"; and {more} more" if more else "")
        raise InputError(lines if len(planner.problems) == 1 else f"{len(planner.problems)} problems: {lines}")
    return MergePlan(recipe, method, checkpoints, template, planner.outputs, planner.config())


class _Planner:
    def __init__(self, recipe: MergeRecipe, method: Method, checkpoints: dict[str, Checkpoint], template: str) -> None:
        self.recipe, self.method, self.checkpoints, self.name = recipe, method, checkpoints, template
        self.template = checkpoints[template]
        self.problems: list[str] = []
        self.outputs: list[Output] = []
        self.stack = main_stack(self.template.names)
        self.order: list[int] = []
        self.heads = self._heads()

    def run(self) -> None:
        self._check_models()
        self._check_vocabularies()
        if self.recipe.slices is None:
            block = _Block(self.recipe.models or [], [self.recipe.parameters])
            length = self.stack[1] if self.stack else 0
            self.order = list(range(length))
            for name in self.template.names:
                if name not in self.heads:
                    self._add(name, name, block, [0] * len(block.sources), self._position(name, length))
            self._check_extra()
        else:
            self._slices()
        self._check_filters()
        if not self.outputs and not self.problems:
            self.problems.append(f"{self.name} holds no tensors to merge")

    def _heads(self) -> dict[str, str]:
        """Tied head → its embedding, where every model that stores the head stores the same numbers."""
        found: dict[str, str] = {}
        every = [name for checkpoint in self.checkpoints.values() for name in checkpoint.names]
        for group in tied(self.template.config, dict.fromkeys(every)):
            for head in group[1:]:
                holders = [c for c in self.checkpoints.values() if head in c and group[0] in c]
                if all(
                    c.spec(head).shape == c.spec(group[0]).shape and torch.equal(c.read(head), c.read(group[0]))
                    for c in holders
                ):
                    found[head] = group[0]
        return found

    def _position(self, name: str, length: int) -> float:
        layer = role_of(name).layer
        if layer is not None:
            return layer / max(length - 1, 1)
        return 0.0 if before_layers(name) else 1.0

    def _check_models(self) -> None:
        method, recipe = self.method, self.recipe
        if method.needs_base == "required" and recipe.base_model is None:
            self.problems.append(f"{method.name} needs base_model")
        groups: list[Sequence[ModelEntry | SliceSource]] = [part.sources for part in recipe.slices or []]
        for group in groups or [recipe.models or []]:
            count = len(self._models(group))
            if count < method.min_models or (method.max_models is not None and count > method.max_models):
                upper = "or more" if method.max_models is None else f"to {method.max_models}"
                self.problems.append(
                    f"{method.name} takes {method.min_models} {upper} models, the recipe gives {count}"
                )
        kinds = {c.config.get("model_type") for c in self.checkpoints.values()} - {None}
        if len(kinds) > 1:
            self.problems.append(f"models of different architectures: {', '.join(sorted(map(str, kinds)))}")

    def _models(self, sources: Sequence[ModelEntry | SliceSource]) -> list[int]:
        """Positions in `sources` of the models the method combines."""
        order = list(range(len(sources)))
        return [i for i in order if sources[i].model != self.recipe.base_model] if self._apart() else order

    def _apart(self) -> bool:
        """Whether the method gets the base apart from its models. Where it is optional and the method is
        elementwise (linear, passthrough) the base is a model like the others, and the template."""
        kind = self.method.needs_base
        return kind == "required" or (kind == "optional" and self.method.sees != "elementwise")

    def _check_vocabularies(self) -> None:
        wanted = self.recipe.tokenizer_source
        if wanted not in (None, "base", "union", *self.checkpoints):
            self.problems.append(f"tokenizer_source {wanted!r} is none of base, union or a model of the recipe")
        template = self.recipe.chat_template
        if template not in (None, "auto") and "{" not in template:
            self.problems.append(f"chat_template {template!r} is neither auto nor a Jinja text")
        own = vocabulary(self.template.folder)
        for name, checkpoint in self.checkpoints.items():
            other = vocabulary(checkpoint.folder)
            if own is not None and other is not None and own != other:
                odd = next(iter(sorted(set(own.items()) ^ set(other.items()))))
                self.problems.append(f"{name}: its vocabulary differs from {self.name}'s (at token {odd[0]!r})")

    def _slices(self) -> None:
        parts = self.recipe.slices or []
        if self.stack is None:
            self.problems.append(f"{self.name} has no layers to slice")
            return
        stack, length = self.stack
        layered: dict[int, list[str]] = {}
        outside: list[str] = []
        for name in self.template.names:
            role = role_of(name)
            if role.stack == stack and role.layer is not None:
                layered.setdefault(role.layer, []).append(name)
            elif name not in self.heads:
                outside.append(name)
        all_sources = [source for part in parts for source in part.sources]
        once = self.method.max_models == 1
        first = parts[0].sources if once else list({s.model: s for s in reversed(all_sources)}.values())[::-1]
        last = parts[-1].sources if once else list({s.model: s for s in all_sources}.values())
        for name in outside:
            early = before_layers(name)
            levels = [parts[0 if early else -1].parameters, self.recipe.parameters]
            block = _Block(first if early else last, levels)
            self._add(name, name, block, [0] * len(block.sources), 0.0 if early else 1.0)
        for part in parts:
            starts = [source.layer_range[0] for source in part.sources]
            count = part.sources[0].layer_range[1] - starts[0]
            for source in part.sources:
                found = main_stack(self.checkpoints[source.model].names)
                if found is None or source.layer_range[1] > found[1]:
                    have = found[1] if found else 0
                    self.problems.append(f"layer_range {list(source.layer_range)}: {source.model} has {have} layers")
            block = _Block(part.sources, [part.parameters, self.recipe.parameters])
            for i in range(count):
                if any(start + i >= length for start in starts):
                    text = f"slices reach layer {max(starts) + count - 1}, {self.name} has {length} layers"
                    self.problems.append(text)
                    break
                new = len(self.order)
                self.order.append(starts[0] + i)
                for name in layered.get(starts[0] + i, []):
                    self._add(with_layer(name, new), name, block, [s + i for s in starts], i / max(count - 1, 1))

    def _add(self, out: str, name: str, block: _Block, layers: Sequence[int], position: float) -> None:
        sliced = self.recipe.slices is not None and role_of(name).stack == (self.stack or ("",))[0]
        chosen = self._models(block.sources)
        base = self.recipe.base_model
        names = [with_layer(name, layer) if sliced else name for layer in layers]
        inputs = [Input(block.sources[i].model, names[i]) for i in chosen]
        base_input = None
        if base is not None and self._apart():
            place = next((i for i, source in enumerate(block.sources) if source.model == base), 0)
            base_input = Input(base, names[place])
        spec = self._spec(out, [*inputs, *([base_input] if base_input else [])], name)
        if spec is None:
            return
        copied = not spec.dtype.is_floating_point
        params, each = None, []
        if not copied:
            params = self._values(self.method.params, block.levels, name, position)
            for i in chosen:
                levels = [block.sources[i].parameters, *block.levels]
                each.append(self._values(self.method.model_params, levels, name, position))
        self.outputs.append(Output(spec, tuple(inputs), base_input, tuple(each), params, copied))

    def _spec(self, out: str, inputs: Sequence[Input], name: str) -> TensorSpec | None:
        own = self.template.spec(name)
        dtypes = set()
        before = len(self.problems)
        for item in inputs:
            checkpoint = self.checkpoints[item.model]
            if item.tensor not in checkpoint:
                self.problems.append(f"{item.model}: missing tensor {item.tensor!r}")
                continue
            spec = checkpoint.spec(item.tensor)
            dtypes.add(spec.dtype)
            if spec.shape != own.shape:
                shapes = f"{list(spec.shape)}, {self.name} has {list(own.shape)}"
                self.problems.append(f"{item.model}: tensor {item.tensor!r} is {shapes}")
        wanted = self.recipe.out_dtype or self.recipe.dtype
        if wanted is None and len(dtypes) > 1:
            found = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            self.problems.append(f"tensor {name!r} is {found}: set dtype in the recipe")
        if len(self.problems) > before:
            return None
        floating = own.dtype.is_floating_point
        if floating and own.dtype.itemsize == 1:
            self.problems.append(f"{self.name}: tensor {name!r} is FP8; dequantise the model first")
            return None
        dtype = getattr(torch, wanted) if wanted and floating else own.dtype
        return TensorSpec(out, dtype, own.shape)

    def _values(self, kind: Any, levels: Sequence[Parameters], name: str, position: float) -> Any:
        given: dict[str, Any] = {}
        for key in _names(kind):
            for level in levels:
                word = key.removesuffix("_")  # lambda is a keyword: the dataclasses spell it lambda_
                value = evaluate(level[word], name, position) if word in level else None
                if value is not None:
                    given[key] = value
                    break
        if kind is None:
            return None
        try:
            return kind(**given)
        except (TypeError, ValueError, InputError) as error:
            text = f"{self.method.name}: {error}"
            if text not in self.problems:
                self.problems.append(text)
            return None

    def _check_extra(self) -> None:
        for model, checkpoint in self.checkpoints.items():
            for name in checkpoint.names:
                if name not in self.template and name not in self.heads:
                    self.problems.append(f"{model}: extra tensor {name!r}, which {self.name} does not have")

    def _check_filters(self) -> None:
        recipe = self.recipe
        parts = [recipe, *(recipe.models or []), *(recipe.slices or [])]
        parts += [source for part in recipe.slices or [] for source in part.sources]
        for text in {t for part in parts for value in part.parameters.values() for t in filters_of(value)}:
            if not any(text in name for name in self.template.names):
                self.problems.append(f"filter {text!r} matches no tensor of {self.name}")

    def config(self) -> dict[str, Any]:
        """The template's config with the true dtype and layer count."""
        config = copy.deepcopy(self.template.config)
        if self.stack is not None:
            config = stacked_config(config, self.order, self.stack[1])
        counts: dict[torch.dtype, int] = {}
        for output in self.outputs:
            if not output.copied:
                counts[output.spec.dtype] = counts.get(output.spec.dtype, 0) + output.spec.nbytes
        if counts:
            dtype = str(max(counts, key=lambda d: counts[d])).removeprefix("torch.")
            places = [config, *(v for v in config.values() if isinstance(v, dict))]
            keys = [(place, key) for place in places for key in ("torch_dtype", "dtype") if key in place]
            for place, key in keys or [(config, "torch_dtype")]:
                place[key] = dtype
        return config


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)] if kind is not None else []
