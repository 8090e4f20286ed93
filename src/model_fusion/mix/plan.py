"""From a mix recipe and opened checkpoints to a list of output tensors. Reads headers and configs, writes nothing.

Every problem is collected, so that a user sees all of them at once and before any byte is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from model_fusion.architecture.roles import main_stack, role_of
from model_fusion.checkpoint.formats import TensorSpec
from model_fusion.checkpoint.lora import AdaptedCheckpoint
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.errors import InputError
from model_fusion.mix import config as configs
from model_fusion.mix.families import FAMILIES, Family
from model_fusion.mix.families.base import FFN
from model_fusion.mix.families.dense import DENSE, REFUSED
from model_fusion.mix.room import Room
from model_fusion.recipe.mix import ExpertEntry, MixRecipe
from model_fusion.recipe.reading import nearest
from model_fusion.tokenizer.table import VOCABULARY_FILES, read_table

How = Literal["copy", "mean", "rows", "columns", "zeros", "gate"]
_UNSHARED = 64  # width of the zero shared expert that Qwen2Moe's class cannot do without
_BUFFERS = ("rotary_emb.inv_freq",)
_OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


@dataclass(frozen=True)
class Part:
    """One input tensor, with mergekit's factor and noise."""

    model: str
    tensor: str
    scale: float = 1.0
    noise: float = 0.0


@dataclass(frozen=True)
class Output:
    """One tensor to make: its parts copied, averaged, joined along rows (then reshaped to the spec) or columns;
    `zeros` has no parts; `gate` is row block [E, H] of layer `layer`. `widened`: the spec has `mix.room` in it, the
    parts have not."""

    spec: TensorSpec
    how: How
    parts: tuple[Part, ...] = ()
    layer: int = -1
    widened: bool = False


@dataclass(frozen=True)
class MixPlan:
    """What `build` executes. `mixed`: layers with experts, in order. `config`: the output's; `dense`: the trunk's.
    `room`: where gate prefix widens the model."""

    recipe: MixRecipe
    family: Family
    checkpoints: Mapping[str, Checkpoint]
    outputs: list[Output]
    mixed: list[int]
    dense: dict[str, Any]
    config: dict[str, Any]
    room: Room | None = None

    @property
    def averaged(self) -> list[Output]:
        """Trunk tensors that differ from the base's: averages over the experts."""
        return [output for output in self.outputs if output.how == "mean"]


def build(recipe: MixRecipe, checkpoints: Mapping[str, Checkpoint]) -> MixPlan:
    """The plan, or one `InputError` that lists every problem."""
    planner = _Planner(recipe, checkpoints)
    plan = planner.run()
    if planner.problems or plan is None:
        shown = list(dict.fromkeys(planner.problems))[:20]
        raise InputError(shown[0] if len(shown) == 1 else f"{len(shown)} problems: {'; '.join(shown)}")
    return plan


class _Planner:
    def __init__(self, recipe: MixRecipe, checkpoints: Mapping[str, Checkpoint]) -> None:
        self.recipe, self.checkpoints = recipe, checkpoints
        self.base = checkpoints[recipe.base_model]
        self.problems: list[str] = []
        self.configs: dict[str, dict[str, Any]] = {}
        self.outputs: list[Output] = []
        self.room: Room | None = None

    def run(self) -> MixPlan | None:
        for name, checkpoint in self.checkpoints.items():
            self._check_kind(name, checkpoint)
        if self.problems:
            return None
        self.dense = self.configs[self.recipe.base_model]
        for name, checkpoint in self.checkpoints.items():
            self._check_tensors(name, checkpoint)
            self._check_same(name)
        family = None if self.problems else self._family()
        if family is None:
            return None
        if self.recipe.chosen_gate() == "prefix":
            self.room = Room.of(self.dense, len(self.recipe.experts))
        layers = int(self.dense["num_hidden_layers"])
        mixed = sorted(self.recipe.layers) if self.recipe.layers is not None else list(range(layers))
        odd = next((n for n in mixed if not 0 <= n < layers), None)
        if odd is not None or not mixed:
            self.problems.append(f"layers: {odd if mixed else 'an empty list'}; {self._name()} has 0 to {layers - 1}")
            return None
        self._trunk(family, mixed, layers)
        for layer in mixed:
            self._experts(family, layer)
        config = self._config(family, [n for n in range(layers) if n not in mixed])
        return MixPlan(self.recipe, family, self.checkpoints, self.outputs, mixed, self.dense, config, self.room)

    def _name(self) -> str:
        return self.recipe.base_model

    def _check_kind(self, name: str, checkpoint: Checkpoint) -> None:
        kind = str(checkpoint.config.get("model_type"))
        if kind not in DENSE:
            reason = REFUSED.get(kind, "no family of this toolkit knows its tensors")
            self.problems.append(f"{name}: {kind} cannot be mixed: {reason} (known: {', '.join(DENSE)})")
            return
        try:
            self.configs[name] = configs.read(checkpoint.config, name)
        except InputError as error:
            self.problems.append(str(error))
        own = str(self.base.config.get("model_type"))
        if kind != own:
            self.problems.append(f"{name} is {kind}, base_model {self._name()} is {own}: give models of one kind")

    def _check_tensors(self, name: str, checkpoint: Checkpoint) -> None:
        """The very tensors the dense class has: nothing else could be carried over, nothing may be missing."""
        dense, count = DENSE[self.dense["model_type"]], int(self.configs[name]["num_hidden_layers"])
        found = main_stack(checkpoint.names)
        if found is not None and found[1] != count:
            self.problems.append(f"{name}: config.json says {count} layers, the weights hold {found[1]}")
            return
        needed = {f"model.layers.{n}.{t}" for n in range(count) for t in dense.tensors}
        needed |= set(_OUTSIDE[: 2 if self.configs[name]["tie_word_embeddings"] else 3])
        optional = {f"model.layers.{n}.{t}" for n in range(count) for t in dense.optional} | set(_OUTSIDE)
        absent = sorted(needed - set(checkpoint.names))
        if absent:
            self.problems.append(f"{name}: missing tensor {absent[0]!r}")
        for extra in checkpoint.names:
            if extra not in needed | optional and not extra.endswith(_BUFFERS):
                self.problems.append(f"{name}: tensor {extra!r} has no place in a mixture of {dense_name(self.dense)}s")
                break
        head, embedding = "lm_head.weight", "model.embed_tokens.weight"
        if self.configs[name]["tie_word_embeddings"] and head in checkpoint and embedding in checkpoint:
            same = checkpoint.spec(head).shape == checkpoint.spec(embedding).shape
            if not same or not torch.equal(checkpoint.read(head), checkpoint.read(embedding)):
                self.problems.append(f"{name}: tie_word_embeddings is true, yet lm_head.weight differs from the input")

    def _check_same(self, name: str) -> None:
        if name == self._name():
            return
        own, other = self.dense, self.configs[name]
        for key in configs.SHAPES_BEHAVIOUR:
            if own.get(key) != other.get(key):
                self.problems.append(f"{name}: {key} is {other.get(key)}, {self._name()} has {own.get(key)}")
        if self.problems:
            return
        mine, theirs = self.base.files(), self.checkpoints[name].files()
        if all(mine.get(file) == theirs.get(file) for file in VOCABULARY_FILES):
            return
        first, second = read_table(mine, self._name()), read_table(theirs, name)
        if first is not None and second is not None:
            odd = next((t for t, i in sorted(first.ids.items()) if second.ids.get(t, i) != i), None)
            if odd is not None:
                self.problems.append(f"{name}: token {odd!r} has another id than in {self._name()}")

    def _family(self) -> Family | None:
        """The named family, or the first that expresses everything asked; objections become problems."""
        kind, wanted = self.dense["model_type"], self.recipe.architecture
        if wanted != "auto" and wanted not in FAMILIES:
            self.problems.append(f"unknown architecture {wanted!r}; {nearest(wanted, FAMILIES)}")
            return None
        objections = []
        for family in FAMILIES.values() if wanted == "auto" else [FAMILIES[wanted]]:
            if family.mixes != self.recipe.mix:
                if wanted != "auto":
                    objections.append(f"{wanted} mixes {family.mixes}: set mix to {family.mixes}")
                continue
            if kind not in family.accepts:
                if wanted != "auto":
                    objections.append(f"{wanted} is made of {' or '.join(family.accepts)}, not of {kind}")
                continue
            objection = self._objection(family)
            if objection is None:
                return family
            objections.append(f"{family.model_type} cannot express {objection}")
        text = "; ".join(objections) or f"{kind} models cannot be mixed by {self.recipe.mix}; llama models can"
        self.problems.append(f"{self._name()}: {text}")
        return None

    def _objection(self, family: Family) -> str | None:
        feature = configs.inexpressible(self.dense, family)
        if feature is not None:
            return feature
        if self.recipe.shared_experts and family.shared is None:
            return "shared_experts"
        if self.recipe.layers is not None and family.dense_layers is None:
            return "a choice of layers"
        if self.recipe.chosen_gate() == "prefix":
            if not family.widens:
                return "gate prefix (its class takes no wider residual stream)"
            if len(self.recipe.experts) > self.dense["head_dim"]:
                return f"gate prefix with more experts than head_dim {self.dense['head_dim']}"
        layers = int(self.dense["num_hidden_layers"])
        for suffix in DENSE[self.dense["model_type"]].optional:
            held = [n for n in range(layers) if f"model.layers.{n}.{suffix}" in self.base]
            if suffix in family.biases:
                if held and len(held) < layers:
                    return f"{suffix} in some layers only"
            elif any(torch.count_nonzero(self.base.read(f"model.layers.{n}.{suffix}")) for n in held):
                return f"{suffix}, which is not zero"  # a zero one adds nothing, with or without a place for it
        present = {s for s in family.biases if f"model.layers.0.{s}" in self.base}
        if present and present != family.biases:
            return f"{sorted(present)[0]} without {sorted(family.biases - present)[0]}"
        return None

    def _trunk(self, family: Family, mixed: list[int], layers: int) -> None:
        head_tied = self.dense["tie_word_embeddings"]
        mixable = {source for sources in family.experts.values() for source in sources}
        kept = [n for n in self.base.names if not n.endswith(_BUFFERS) and not (head_tied and n == "lm_head.weight")]
        adapted = {t: m for m, c in self.checkpoints.items() if isinstance(c, AdaptedCheckpoint) for t in c.adapted}
        for name in kept:
            role = role_of(name)
            suffix = name.split(".", 3)[-1] if role.layer is not None else name
            if suffix in mixable and role.layer in mixed:
                continue
            if suffix in DENSE[self.dense["model_type"]].optional and suffix not in family.biases:
                continue  # zero, see _objection
            if name in adapted and suffix not in mixable and self.recipe.attention_lora == "refuse":
                self.problems.append(
                    f"{adapted[name]}: its adapter changes {name!r}, which is no expert: set attention_lora to "
                    "average (of all experts) or base (leave it out)"
                )
                return
            mean = self.recipe.trunk == "average" or (name in adapted and self.recipe.attention_lora == "average")
            models = list(dict.fromkeys(e.model for e in self.recipe.experts)) if mean else [self._name()]
            if self.recipe.trunk == "require_equal":
                self._require_equal(name)
            if mean and not all(name in self.checkpoints[m] for m in models):
                self.problems.append(f"trunk average: {name!r} is not in every expert")
                continue
            weights = [sum(e.model == m for e in self.recipe.experts) / len(self.recipe.experts) for m in models]
            parts = tuple(Part(m, name, w if mean else 1.0) for m, w in zip(models, weights, strict=False))
            self._add(name, "mean" if mean else "copy", parts, self.base.spec(name).shape)

    def _require_equal(self, name: str) -> None:
        for entry in self.recipe.experts:
            other = self.checkpoints[entry.model]
            if name not in other or not torch.equal(other.read(name), self.base.read(name)):
                self.problems.append(
                    f"trunk require_equal: {name!r} of {entry.model} differs from {self._name()}'s; "
                    "set trunk to base or average"
                )
                return

    def _experts(self, family: Family, layer: int) -> None:
        prefix, hidden = f"model.layers.{layer}.", int(self.dense["hidden_size"])
        seen = hidden if self.room is None else self.room.width
        total = len(self.recipe.experts)
        for target, sources in family.experts.items():
            each = [tuple(_part(entry, prefix + source) for source in sources) for entry in self.recipe.experts]
            rows = sum(self.base.spec(prefix + source).shape[0] for source in sources)
            columns = self.base.spec(prefix + sources[0]).shape[1]
            if "{expert}" in target:
                for i, parts in enumerate(each):
                    self._add(prefix + target.format(expert=i), "rows", parts, (rows, columns))
            else:
                joined = tuple(part for parts in each for part in parts)
                self._add(prefix + target, "rows", joined, (total, rows, columns))
        gate = TensorSpec(prefix + family.gate, self._dtype(self.base.spec(prefix + FFN[0]).dtype), (total, seen))
        self.outputs.append(Output(gate, "gate", layer=layer))
        if family.shared:
            self._shared(family, prefix, layer, hidden)

    def _shared(self, family: Family, prefix: str, layer: int, hidden: int) -> None:
        """FFNs side by side are their sum; the sigmoid gate at 0 gives one half, so down is doubled."""
        if family.shared is None:
            return
        width = self._shared_width(family)
        for source, target in family.shared.tensors.items():
            down = source == FFN[2]
            parts = tuple(_part(entry, prefix + source) for entry in self.recipe.shared_experts)
            if down:
                parts = tuple(replace(part, scale=2 * part.scale) for part in parts)
            how: How = ("columns" if down else "rows") if parts else "zeros"
            self._add(prefix + target, how, parts, (hidden, width) if down else (width, hidden))
        self._add(prefix + family.shared.gate, "zeros", (), (1, hidden))

    def _shared_width(self, family: Family) -> int:
        if family.shared is None:
            return 0
        return int(self.dense["intermediate_size"]) * len(self.recipe.shared_experts) or _UNSHARED

    def _dtype(self, default: torch.dtype) -> torch.dtype:
        return getattr(torch, self.recipe.dtype) if self.recipe.dtype else default

    def _add(self, target: str, how: How, parts: tuple[Part, ...], shape: tuple[int, ...]) -> None:
        dtypes = set()
        for part in parts:
            checkpoint = self.checkpoints[part.model]
            spec, own = checkpoint.spec(part.tensor), self.base.spec(part.tensor)
            dtypes |= {spec.dtype, own.dtype}  # one dtype throughout, as the base has it
            if spec.shape != own.shape:
                shapes = f"{list(spec.shape)}, {self._name()} has {list(own.shape)}"
                self.problems.append(f"{part.model}: tensor {part.tensor!r} is {shapes}")
        if len(dtypes) > 1 and self.recipe.dtype is None:
            found = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            self.problems.append(f"tensor {target!r} would be made of {found}: set dtype in the recipe")
        bad = next((d for d in dtypes if not d.is_floating_point or d.itemsize == 1), None)
        if bad is not None:
            self.problems.append(f"tensor {target!r} would be made of {bad}: dequantise the model first")
        default = next(iter(dtypes)) if dtypes else self.base.spec("model.embed_tokens.weight").dtype
        if self.room is not None and self._dtype(default) == torch.float16:
            self.problems.append("gate prefix: float16 cannot hold its small numbers: set dtype to bfloat16 or float32")
        if self.room is not None:
            shape = self.room.shape(parts[0].tensor, shape)
        spec = TensorSpec(target, self._dtype(default), shape)
        self.outputs.append(Output(spec, how, parts, widened=self.room is not None))

    def _config(self, family: Family, left_dense: list[int]) -> dict[str, Any]:
        counts: dict[torch.dtype, int] = {}
        for output in self.outputs:
            counts[output.spec.dtype] = counts.get(output.spec.dtype, 0) + output.spec.nbytes
        return configs.write(
            self.dense if self.room is None else {**self.dense, **self.room.config()},
            family,
            experts=len(self.recipe.experts),
            top_k=self.recipe.top_k(),
            biased=any(o.spec.name.endswith(tuple(family.biases)) for o in self.outputs) if family.biases else False,
            left_dense=left_dense,
            shared_width=self._shared_width(family),
            dtype=str(max(counts, key=lambda d: counts[d])).removeprefix("torch."),
        )


def dense_name(config: Mapping[str, Any]) -> str:
    """The dense model type, as a word in a sentence."""
    return str(config["model_type"])


def _part(entry: ExpertEntry, tensor: str) -> Part:
    scale = entry.residual_scale if entry.residual_scale is not None and tensor.endswith(FFN[2]) else 1.0
    return Part(entry.model, tensor, scale, entry.noise_scale or 0.0)
