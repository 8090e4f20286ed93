"""From a recipe and opened checkpoints to a list of output tensors. Reads headers and configs.

Every problem is collected, so that a user sees all of them at once and before any byte is written.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from model_fusion.architecture.align import backbone, family, multimodal
from model_fusion.architecture.roles import Rows, computed, depth_of, has_row_a_token, rows_of, stacks, tied
from model_fusion.architecture.stacking import stacked_config
from model_fusion.checkpoint.formats import TensorSpec
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.statistics import StatisticsFile
from model_fusion.errors import InputError
from model_fusion.merge.data import Data
from model_fusion.merge.layout import Item, Layout
from model_fusion.merge.parameters import names_of
from model_fusion.merge.prepare import Prepared
from model_fusion.recipe.merge import MergeRecipe, ModelEntry, Module, Parameters, SliceSource
from model_fusion.recipe.parameters import evaluate, filters_of, fitted
from model_fusion.recipe.reading import nearest


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
    def equal_norms(self) -> bool: ...
    @property
    def needs_data(self) -> Any: ...
    @property
    def stream(self) -> Any: ...


@dataclass(frozen=True)
class Input:
    """One tensor of one model, or of a file of statistics."""

    model: str
    tensor: str


@dataclass(frozen=True)
class Output:
    """One tensor to make. `copied` tensors (integers, buffers) are taken from the first input as they are. `depth` and
    `rows` as in a method's `Key`; `data`: the statistic of each input, if any."""

    spec: TensorSpec
    inputs: tuple[Input, ...]
    base: Input | None
    model_params: tuple[Any, ...]
    params: Any
    copied: bool = False
    depth: float | None = None
    rows: Rows = "outputs"
    data: tuple[Input, ...] = ()


@dataclass(frozen=True)
class MergePlan:
    """What `engine` executes. `template` is the model whose config the output gets, `files` its small files; `stages`
    are the named merges to make first, in order; `data` the files of statistics; `left_out` are tensors not written."""

    recipe: MergeRecipe
    method: Method
    checkpoints: dict[str, Checkpoint]
    template: str
    outputs: list[Output]
    config: dict[str, Any]
    files: dict[str, bytes]
    stages: dict[str, "MergePlan"] = field(default_factory=dict)
    data: dict[str, StatisticsFile] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def every(self) -> dict[str, Checkpoint]:
        """All that is read, models and statistics."""
        return {**self.checkpoints, **self.data}

    def notes(self) -> list[str]:
        """What the card should tell beyond the recipe."""
        found = []
        if self.left_out:
            names = f"{self.left_out[0]}{f' and {len(self.left_out) - 1} more' if len(self.left_out) > 1 else ''}"
            found.append(f"left out, as not every model stores these buffers, which loaders compute: {names}")
        if self.data:
            merged = [item for item in self.outputs if not item.copied]
            own = sum(bool(item.data) for item in merged)
            kept = f"{own} of {len(merged)} tensors have statistics"
            found.append(f"{self.method.name}: {kept}; the other {len(merged) - own} are weighted means")
        return found


def build(
    recipe: MergeRecipe,
    method: Method,
    ready: Prepared,
    fill_missing: str | None = None,
    data: Mapping[str, StatisticsFile] | None = None,
) -> MergePlan:
    """The plan, or one `InputError` that lists every problem. `fill_missing`: the model (or `base`) that gives the
    tensors which another lacks. `data`: the recipe's files of statistics."""
    fill = (recipe.base_model or ready.template) if fill_missing == "base" else fill_missing
    if fill is not None and fill not in ready.checkpoints:
        raise InputError(
            f"--fill-missing {fill!r} is no model of the recipe; {nearest(fill, ['base', *ready.checkpoints])}"
        )
    planner = _Planner(_with_base(recipe, method), method, ready, fill, data or {})
    planner.run()
    if planner.problems:
        shown = planner.problems[:50]
        more = len(planner.problems) - len(shown)
        lines = "; ".join(shown) + (f"; and {more} more" if more else "")
        raise InputError(lines if len(planner.problems) == 1 else f"{len(planner.problems)} problems: {lines}")
    config = planner.config()
    return MergePlan(
        recipe,
        method,
        ready.checkpoints,
        ready.template,
        planner.outputs,
        config,
        ready.files,
        data=dict(data or {}),
        left_out=planner.left_out,
    )


def base_apart(method: Method) -> bool:
    """Whether the method gets the base apart from its models. Where it is optional and the method elementwise
    (linear, passthrough), and where it is forbidden (karcher), the base is a model like the others."""
    return method.needs_base == "required" or (method.needs_base == "optional" and method.sees != "elementwise")


def _with_base(recipe: MergeRecipe, method: Method) -> MergeRecipe:
    """The recipe with a base that is listed nowhere among the models, where the method takes it for one of them
    (mergekit's rule). A method of one model has no place for it: its base says whose config the output gets."""
    base = recipe.base_model
    if base is None or base_apart(method) or method.max_models == 1:
        return recipe

    def joined(part: MergeRecipe | Module, levels: Sequence[Parameters]) -> list[ModelEntry] | None:
        if part.models is None or any(entry.model == base for entry in part.models):
            return part.models
        if "weight" in names_of(method.model_params) and not any("weight" in level for level in levels):
            raise InputError(
                f"{method.name} merges base_model {base} too, which has no weight: list it under models with one, or "
                "remove base_model"
            )
        return [*part.models, ModelEntry(model=base)]

    modules = {
        key: part.model_copy(update={"models": joined(part, [part.parameters, recipe.parameters])})
        for key, part in (recipe.modules or {}).items()
    }
    return recipe.model_copy(update={"models": joined(recipe, [recipe.parameters]), "modules": modules or None})


class _Planner:
    def __init__(
        self,
        recipe: MergeRecipe,
        method: Method,
        ready: Prepared,
        fill: str | None,
        data: Mapping[str, StatisticsFile],
    ) -> None:
        self.recipe, self.method, self.fill = recipe, method, fill
        self.checkpoints, self.name = ready.checkpoints, ready.template
        self.template = self.checkpoints[self.name]
        self.first_config = ready.config
        self.problems: list[str] = list(ready.problems)
        self.outputs: list[Output] = []
        self.data = Data(method, data)
        self.heads = self._heads()
        self.left_out = self._left_out()
        self.layout = Layout(recipe, self.checkpoints, self.name, {*self.heads, *self.left_out})
        self.problems += self.layout.problems
        self.lengths = stacks(item.out for item in self.layout.items)
        # a text model has no tower: what lies outside the backbone may be one model's alone
        outside = multimodal(self.template.config)
        self.shared = set(backbone(self.template.names)) if outside else set(self.template.names)

    def run(self) -> None:
        self._check_models()
        for item in self.layout.items:
            self._add(item)
        if self.layout.picks is None:
            self._check_extra()
        self._check_filters()
        self.problems += self.data.finish()
        if not self.outputs and not self.problems:
            self.problems.append(f"{self.name} holds no tensors to merge")

    def _heads(self) -> dict[str, str]:
        """Tied head → its embedding, where every model that stores the head stores the same numbers."""
        found: dict[str, str] = {}
        every = [name for checkpoint in self.checkpoints.values() for name in checkpoint.names]
        for group in tied(self.template.config, dict.fromkeys(every)):
            for head in group[1:]:
                holders = [c for c in self.checkpoints.values() if head in c and group[0] in c]
                if all(c.same(head, group[0]) for c in holders):
                    found[head] = group[0]
        return found

    def _left_out(self) -> list[str]:
        """Buffers that loaders compute, where not every model stores them."""
        every = dict.fromkeys(
            spec.name for c in self.checkpoints.values() for spec in c if computed(spec.name, spec.shape)
        )
        complete = all(name in checkpoint for name in every for checkpoint in self.checkpoints.values())
        return [] if complete else list(every)

    def _check_models(self) -> None:
        method, recipe = self.method, self.recipe
        owners: list[MergeRecipe | Module] = [recipe, *(recipe.modules or {}).values()]
        groups: list[tuple[Sequence[ModelEntry | SliceSource], str | None]]
        groups = [(owner.models, recipe.base_model) for owner in owners if owner.models]
        groups += [(p.sources, p.base_model or recipe.base_model) for owner in owners for p in owner.slices or []]
        if method.needs_base == "required" and any(base is None for _, base in groups):
            self.problems.append(f"{method.name} needs base_model")
        for group, base in groups:
            chosen = self._models(group, base)
            self.data.check([group[i] for i in chosen], self.checkpoints)
            count = len(chosen)
            if count < method.min_models or (method.max_models is not None and count > method.max_models):
                upper = "or more" if method.max_models is None else f"to {method.max_models}"
                self.problems.append(
                    f"{method.name} takes {method.min_models} {upper} models, the recipe gives {count}"
                )
        configs = [c.config for c in self.checkpoints.values()]
        kinds = {config.get("model_type") for config in configs} - {None}
        if any(map(multimodal, configs)):
            kinds = {family(config) for config in configs} - {None}
        if len(kinds) > 1:
            self.problems.append(f"models of different architectures: {', '.join(sorted(map(str, kinds)))}")

    def _models(self, sources: Sequence[ModelEntry | SliceSource], base: str | None) -> list[int]:
        """Positions in `sources` of the models the method combines."""
        order = list(range(len(sources)))
        return [i for i in order if sources[i].model != base] if base_apart(self.method) else order

    def _add(self, item: Item) -> None:
        block = item.block
        if block is None:
            self._copy(item)
            return
        base, chosen = block.base, self._models(block.sources, block.base)
        inputs = [self._holder(Input(block.sources[i].model, item.names[i])) for i in chosen]
        base_input = None
        if base is not None and base_apart(self.method):
            place = next((i for i, source in enumerate(block.sources) if source.model == base), 0)
            base_input = Input(base, item.names[place])
        every = [*inputs, *([base_input] if base_input else [])]
        if item.name not in self.shared and any(i.tensor not in self.checkpoints[i.model] for i in every):
            self._copy(item)
            return
        spec = self._spec(item.out, every, item.name)
        if spec is None:
            return
        name, position = item.name, item.position
        copied = not spec.dtype.is_floating_point
        params, each = None, []
        if not copied:
            params = self._values(self.method.params, block.levels, name, position)
            for i in chosen:
                levels = [block.sources[i].parameters, *block.levels]
                each.append(self._values(self.method.model_params, levels, name, position))
        depth, rows = depth_of(item.out, self.lengths), rows_of(name, self.template.config)
        data: tuple[Input, ...] = ()
        if not copied:
            sources = [block.sources[i] for i in chosen]
            found = self.data.of(sources, [item.names[i] for i in chosen], self.checkpoints, spec)
            if found and self.data.inputs_first(*found[0]):
                rows = "inputs"
            data = tuple(Input(text, tensor) for text, tensor in found)
        self.outputs.append(Output(spec, tuple(inputs), base_input, tuple(each), params, copied, depth, rows, data))

    def _holder(self, wanted: Input) -> Input:
        """The input itself, or the same tensor of the model that fills gaps."""
        if self.fill is None or wanted.tensor in self.checkpoints[wanted.model]:
            return wanted
        return Input(self.fill, wanted.tensor)

    def _copy(self, item: Item) -> None:
        """The template's tensor as it is: no arithmetic, no change of dtype."""
        own = self.template.spec(item.name)
        spec = TensorSpec(item.out, own.dtype, own.shape)
        self.outputs.append(Output(spec, (Input(self.name, item.name),), None, (), None, copied=True))

    def _spec(self, out: str, inputs: Sequence[Input], name: str) -> TensorSpec | None:
        holder = self.template if name in self.template else self.checkpoints[inputs[0].model]
        own = holder.spec(name)
        dtypes = set()
        before = len(self.problems)
        for item in inputs:
            checkpoint = self.checkpoints[item.model]
            if item.tensor not in checkpoint:
                text = f"{item.model}: missing tensor {item.tensor!r} (--fill-missing base takes it from the base)"
                self.problems.append(text)
                continue
            spec = checkpoint.spec(item.tensor)
            dtypes.add(spec.dtype)
            if spec.shape != own.shape:
                shapes = f"{list(spec.shape)}, {self.name} has {list(own.shape)}"
                hint = " (tokenizer_source: base merges by token)" if has_row_a_token(name) else ""
                self.problems.append(f"{item.model}: tensor {item.tensor!r} is {shapes}{hint}")
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
        for key in names_of(kind):
            for level in levels:
                word = key.removesuffix("_")  # lambda is a keyword: the dataclasses spell it lambda_
                value = evaluate(level[word], name, position) if word in level else None
                if value is not None:
                    given[key] = value
                    break
        if kind is None:
            return None
        try:
            return kind(**fitted(kind, given))
        except InputError as error:
            text = f"{self.method.name}: {error}"
            rule = text.partition(", got")[0]  # a gradient breaks one rule in many layers
            if not any(problem.startswith(rule) for problem in self.problems):
                self.problems.append(text)
            return None

    def _check_extra(self) -> None:
        for model, checkpoint in self.checkpoints.items():
            for name in checkpoint.names:
                if name not in self.template and name not in self.heads and name not in self.left_out:
                    self.problems.append(f"{model}: extra tensor {name!r}, which {self.name} does not have")

    def _check_filters(self) -> None:
        recipe = self.recipe
        for text in {t for part in recipe.parts() for value in part.parameters.values() for t in filters_of(value)}:
            if not any(text in name for name in self.template.names):
                self.problems.append(f"filter {text!r} matches no tensor of {self.name}")

    def config(self) -> dict[str, Any]:
        """The template's config with the true dtype and layer count."""
        config = copy.deepcopy(self.first_config)
        if not config:  # a bare state dict has none
            return config
        if self.layout.picks is not None:
            config = stacked_config(config, [(self.checkpoints[m].config, n) for m, n in self.layout.picks])
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
