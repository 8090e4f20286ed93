"""A fuse recipe checked to the end before anything is trained: experts, examples, bridge, settings, prompts, lengths.
The LLM's weights are not read for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from model_fusion.checkpoint.llm import LLMSource, load_tokenizer, resolve_llm
from model_fusion.errors import InputError, ModelFusionError
from model_fusion.fuse.align import TRAINING as ALIGN
from model_fusion.fuse.align import asks
from model_fusion.fuse.bridges import Bridge, BridgeConfig, Gated, LLMShape, Logit, Prefix, Tool, bridge_config
from model_fusion.fuse.data import read_examples
from model_fusion.fuse.experts import Expert
from model_fusion.fuse.fit import Example, ExampleLike, held_out
from model_fusion.fuse.placeholders import check_names, placeholder, reserve_ids
from model_fusion.fuse.processor import FusedProcessor
from model_fusion.recipe.fuse import FuseRecipe
from model_fusion.recipe.reading import nearest
from model_fusion.run.experts import load_experts
from model_fusion.training.loop import TrainSettings


@dataclass(frozen=True)
class Plan:
    """All that a fusion needs but the LLM's weights. `task` is the record of a built-in task, or None."""

    recipe: FuseRecipe
    base: LLMSource
    experts: dict[str, Expert]
    bridge: BridgeConfig
    settings: TrainSettings
    train: list[ExampleLike]
    validation: list[ExampleLike]
    task: dict[str, Any] | None


def make_plan(recipe: FuseRecipe, *, given: Mapping[str, Any] | None = None) -> Plan:
    """Load and check what `recipe` names, the cheap things first. Raises InputError or IntegrityError."""
    check_names(recipe.experts)
    named = None if recipe.bridge is None else bridge_config(recipe.bridge)
    settings = training_settings(recipe, named or Gated())
    base = resolve_llm(recipe.base)
    experts, train, validation, task = _from_task(recipe) if recipe.data.task else _from_files(recipe, given)
    bridge = named or default_bridge(recipe.objective, experts)
    if recipe.objective == "align" and isinstance(bridge, Logit | Tool):
        raise InputError(f"objective: the {bridge.kind} bridge has nothing to align; take prefix or lora")
    if len(train) < 2:
        raise InputError(f"{recipe.data.file or recipe.data.task}: {len(train)} training examples; give at least 2")
    groups = {"training data": train, "validation data": validation}
    if recipe.objective == "align":
        groups = {where: to_align(where, examples, experts) for where, examples in groups.items()}
    check_prompts(base, experts, bridge, groups)
    return Plan(recipe, base, experts, bridge, settings, train, validation, task)


def default_bridge(objective: str, experts: Mapping[str, Expert]) -> BridgeConfig:
    """`gated`; to align, one soft token that is one of as many codes as the experts have classes, or four free ones
    where an expert says a value."""
    if objective == "answers":
        return Gated()
    counts = [len(getattr(expert, "classes", None) or ()) for expert in experts.values()]
    return Prefix(tokens=1, codes=max(16, *counts)) if all(counts) else Prefix()


def to_align(where: str, examples: Sequence[ExampleLike], experts: Mapping[str, Expert]) -> list[ExampleLike]:
    """What aligning will read of `examples`, as prompts that can be checked. Raises InputError."""
    found: list[ExampleLike] = []
    for number, example in enumerate(examples, 1):
        if example.prompt:
            try:
                asks(example.prompt, tuple(experts))
            except InputError as error:
                raise InputError(f"{where}: example {number}: {error}") from None
        found += [Example(example.prompt or placeholder(name), {name: x}, "") for name, x in example.inputs.items()]
    for name in experts:
        if not any(name in example.inputs for example in examples):
            raise InputError(f"{where}: no row has an input for expert {name!r}")
    return found


def training_settings(recipe: FuseRecipe, bridge: BridgeConfig) -> TrainSettings:
    """The bridge's own settings, overridden by the recipe's. Raises InputError for an unknown or misfitting one."""
    known = [field.name for field in dataclasses.fields(TrainSettings)]
    for name in recipe.training:
        if name not in known:
            raise InputError(f"training: unknown key {name!r}; {nearest(name, known)}")
    defaults = ALIGN if recipe.objective == "align" else bridge.training
    try:
        return TypeAdapter(TrainSettings).validate_python({**defaults, **recipe.training, "seed": recipe.seed})
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"training.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _from_task(
    recipe: FuseRecipe,
) -> tuple[dict[str, Expert], list[ExampleLike], list[ExampleLike], dict[str, Any] | None]:
    from model_fusion.evaluate.tasks import NAMES, task

    name, options = str(recipe.data.task), {"seed": recipe.seed, **recipe.data.options}
    if name not in NAMES:
        raise InputError(f"data.task: unknown task {name!r}; {nearest(name, NAMES)}")
    try:
        made = task(name, **options)
    except TypeError as error:
        raise InputError(f"data.options: {str(error).split('() ')[-1]}; see the task {name!r}") from None
    record = {"name": name, "options": options}
    return {made.expert_name: made.expert}, list(made.train), list(made.validation), record


def _from_files(
    recipe: FuseRecipe, given: Mapping[str, Any] | None
) -> tuple[dict[str, Expert], list[ExampleLike], list[ExampleLike], None]:
    experts = load_experts(recipe.experts, given)
    schemas = {name: expert.inputs for name, expert in experts.items()}
    file, held = recipe.data.file, recipe.validation
    assert file is not None
    labelled = recipe.objective == "answers"
    options: dict[str, Any] = {"prompt": recipe.data.prompt, "answers": labelled, "prompts": labelled}
    examples: list[ExampleLike] = list(read_examples(file, schemas, **options))
    if held is not None and held.file is not None:
        return experts, examples, list(read_examples(held.file, schemas, **options)), None
    if len(examples) < 3:
        raise InputError(f"{file}: {len(examples)} examples; give at least 3, or a validation file beside them")
    share = 0.2 if held is None else held.share
    return experts, *held_out(examples, recipe.seed, share or 0.2), None


def check_prompts(
    base: LLMSource,
    experts: Mapping[str, Expert],
    chosen: BridgeConfig,
    groups: Mapping[str, Sequence[ExampleLike]],
) -> None:
    """Encode every example as training will, with the LLM's tokenizer and sizes but not its weights.

    Raises InputError for an unknown placeholder, features that are not finite, a bridge that does not fit the LLM,
    and a prompt with answer that is longer than the LLM's context.
    """
    config, tokenizer = load_tokenizer(base)
    check_names(experts, tokenizer)
    text = config.get_text_config(decoder=True)
    shape = LLMShape(text.hidden_size, text.num_hidden_layers, 1.0, torch.zeros(text.hidden_size))
    with torch.random.fork_rng(devices=[]):
        bridge: Bridge = chosen.build(shape, {name: expert.feature_shape for name, expert in experts.items()})
    ids = reserve_ids(tokenizer, text.vocab_size, len(experts))
    processor = FusedProcessor(tokenizer, experts, bridge, dict(zip(experts, ids, strict=True)))
    limit = getattr(text, "max_position_embeddings", None)
    for where, examples in groups.items():
        try:
            rows = processor.encode(
                [e.prompt for e in examples], [e.inputs for e in examples], [e.answer for e in examples]
            )
        except ModelFusionError as error:
            raise type(error)(f"{where}: {error}") from None
        longest = max(range(len(rows)), key=lambda i: len(rows[i].ids))
        if limit and len(rows[longest].ids) > limit:
            raise InputError(
                f"{where}: example {longest + 1} has {len(rows[longest].ids)} tokens with its answer, the LLM "
                f"{Path(base.name).name} reads {limit}: shorten its prompt or answer"
            )
