"""The experts that a recipe or a saved fusion names, as live objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_fusion.errors import InputError, ModelFusionError
from model_fusion.fuse.experts import Expert, Field, Given, InputSchema
from model_fusion.fuse.experts.folder import read_expert
from model_fusion.fuse.experts.scored import as_given
from model_fusion.recipe.fuse import ExpertSpec, FieldSpec


def schema_of(fields: list[FieldSpec]) -> InputSchema:
    """The input schema that a recipe spells out."""
    return InputSchema(tuple(Field(f.name, f.type, f.low, f.high, tuple(f.choices), tuple(f.shape)) for f in fields))


def load_experts(specs: Mapping[str, ExpertSpec], given: Mapping[str, Any] | None = None) -> dict[str, Expert]:
    """Every expert of a recipe. given: live parts by expert name, as in `FusedModel.from_pretrained`.

    Raises InputError or IntegrityError, with the expert's name in front.
    """
    for name in given or {}:
        if name not in specs:
            raise InputError(f"given names {name!r}, but the recipe's experts are {', '.join(specs)}")
    found = {}
    for name, spec in specs.items():
        try:
            found[name] = _load(spec, (given or {}).get(name))
        except ModelFusionError as error:
            raise type(error)(f"expert {name!r}: {error}") from None
    return found


def _load(spec: ExpertSpec, given: Any) -> Expert:
    kind, file = spec.resolved_kind(), spec.file
    if kind == "saved":
        return read_expert(file, given=given, allow_pickle=spec.allow_pickle)
    if not file.is_file():
        raise InputError(f"{file}: no such file; correct `file` in the recipe")
    inputs = schema_of(spec.inputs or [])
    options = spec.options()
    if kind == "onnx":
        return Expert.from_onnx(file, inputs, **options, **_code(given, "preprocess"))
    if kind == "sklearn":
        return Expert.from_sklearn(
            file, inputs, allow_pickle=spec.allow_pickle, **options, **_code(given, "preprocess")
        )
    module = as_given(given, "module").module
    if module is None:
        raise InputError(
            "a torch expert's architecture is code that no file holds: export it with torch.onnx.export, "
            "or call model_fusion.fuse(recipe, output, given={name: module}) in Python"
        )
    return Expert.from_torch(module, inputs, weights=file, **options, **_code(given, "module"))


def _code(given: Any, field: str) -> dict[str, Any]:
    """The functions that the caller hands in beside a file."""
    parts = as_given(given, field)
    return {name: getattr(parts, name) for name in ("preprocess", "words") if getattr(parts, name) is not None}


def task_parts(record: Mapping[str, Any] | None) -> dict[str, Given]:
    """The live parts of a built-in task's expert, so that a fusion of one loads without help; {} for no task.

    The task is made again (its expert trains in seconds); the weights that count are the saved ones.
    """
    if not record or "name" not in record:
        return {}
    from model_fusion.evaluate.saved import live_parts
    from model_fusion.evaluate.tasks import task

    made = task(record["name"], **record.get("options", {}))
    return {made.expert_name: live_parts(made.expert)}


def saved_schemas(config: Mapping[str, Any]) -> dict[str, InputSchema]:
    """The input schemas of a saved fusion's experts, from its config alone."""
    return {name: InputSchema.from_json(expert["inputs"]) for name, expert in config["experts"].items()}
