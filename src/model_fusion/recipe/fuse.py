"""What a fuse recipe may say: the base LLM, the experts, the bridge, the examples, the training. Knows no file but
the recipe's own; relative paths in it count from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from model_fusion.recipe.strict import Strict, read_yaml, validated

Kind = Literal["onnx", "sklearn", "torch", "saved"]
KINDS_BY_SUFFIX: dict[str, Kind] = {
    ".onnx": "onnx",
    **dict.fromkeys((".skops", ".pkl", ".pickle", ".joblib"), "sklearn"),
    **dict.fromkeys((".safetensors", ".pt", ".pth"), "torch"),
}


class FieldSpec(Strict):
    """One value of an expert's input; see `InputSchema`."""

    name: str
    type: Literal["int", "float", "bool", "category", "array", "text"]
    low: float | None = None
    high: float | None = None
    choices: list[str] = Field(default_factory=list)
    shape: list[int] = Field(default_factory=list)


class ExpertSpec(Strict):
    """One expert's file and what its input and output mean.

    `kind` follows from the file's name unless given: .onnx; .skops, .pkl, .joblib (sklearn); .safetensors, .pt (torch,
    whose architecture must be handed in from Python); a folder (saved). A saved expert carries all but `file` itself.
    """

    file: Path
    kind: Kind | None = None
    inputs: list[FieldSpec] | None = Field(default=None, min_length=1)
    classes: list[str] | None = None
    tap: str | None = None
    scores: Literal["logits", "probabilities"] | None = None
    output: str | None = None
    columns: list[str] | None = None
    words: dict[str, str] | None = None
    trusted: list[str] | None = None
    allow_pickle: bool = False

    @field_validator("classes", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        # YAML reads yes, no and 7 as other types; a class's name is text.
        if isinstance(value, list) and any(isinstance(name, bool) for name in value):
            raise ValueError("YAML reads yes, no, on, off, true and false as truth values: put class names in quotes")
        return [str(name) for name in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _own_keys(self) -> ExpertSpec:
        kind = self.resolved_kind()
        if kind == "saved":
            given = sorted(self.model_fields_set - {"file", "kind", "allow_pickle"})
            if given:
                raise ValueError(f"a saved expert knows its own {', '.join(given)}: remove it from the recipe")
            return self
        if self.inputs is None:
            raise ValueError("inputs is missing: list the fields of one input, each with name and type")
        options: dict[str, set[str]] = {
            "onnx": {"scores", "output"},
            "torch": {"scores"},
            "sklearn": {"columns", "trusted"},
        }
        for key in ("scores", "output", "columns", "trusted"):
            if getattr(self, key) is not None and key not in options[kind]:
                raise ValueError(f"{key} has no meaning for a {kind} expert: remove it")
        return self

    def resolved_kind(self) -> Kind:
        """The kind as given, or as the file's name says."""
        return self.kind or KINDS_BY_SUFFIX.get(self.file.suffix, "saved")

    def options(self) -> dict[str, Any]:
        """What the recipe sets beyond file, kind, inputs and the permission to unpickle."""
        names = ("classes", "tap", "scores", "output", "columns", "words", "trusted")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class DataSpec(Strict):
    """Examples: a JSONL or CSV `file` (`prompt` is for rows without their own), or a built-in `task`."""

    file: Path | None = None
    prompt: str | None = None
    task: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_source(self) -> DataSpec:
        if (self.file is None) == (self.task is None):
            raise ValueError("give either `file` (JSONL or CSV) or `task` (one of them, not both)")
        if self.options and self.task is None:
            raise ValueError("options belong to a task; a file has none")
        if self.prompt is not None and self.task is not None:
            raise ValueError("a task brings its own prompt; remove `prompt`")
        return self


class ValidationSpec(Strict):
    """Held-out examples: a `file`, or a `share` of the data."""

    file: Path | None = None
    share: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_source(self) -> ValidationSpec:
        if (self.file is None) == (self.share is None):
            raise ValueError("give either `file` or `share` (one of them, not both)")
        return self


class FuseRecipe(Strict):
    """A fusion. `training` holds fields of `TrainSettings`; `experts` may be left out where a task brings its own.
    `objective`: "answers" trains on the examples' answers; "align" needs none, and trains the LLM to read the expert as
    it reads the expert's words. `bridge`: gated, or for "align" soft tokens that start as the expert's words.
    `keep_language` is the weight of a second loss that keeps the LLM talking as itself of other things."""

    base: str = "smollm2"
    experts: dict[str, ExpertSpec] = Field(default_factory=dict)
    objective: Literal["answers", "align"] = "answers"
    bridge: str | dict[str, Any] | None = None
    data: DataSpec
    validation: ValidationSpec | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    keep_language: float = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"

    @field_validator("data", mode="before")
    @classmethod
    def _data_file(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value

    @field_validator("validation", mode="before")
    @classmethod
    def _validation_file(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"file": value}
        return {"share": value} if isinstance(value, float | int) and not isinstance(value, bool) else value

    @field_validator("bridge", mode="before")
    @classmethod
    def _bridge(cls, value: Any) -> Any:
        if not isinstance(value, str | dict):  # (None is the default only, and a default is not validated)
            raise ValueError("give a bridge's name, or a mapping with `kind` and its settings")
        return value

    @model_validator(mode="after")
    def _experts_and_data(self) -> FuseRecipe:
        if self.data.task is None and not self.experts:
            raise ValueError("no expert is named: add one under `experts`")
        if self.data.task is not None and self.experts:
            raise ValueError(f"the task {self.data.task!r} brings its own expert: remove `experts`")
        if self.data.task is not None and self.validation is not None:
            raise ValueError(f"the task {self.data.task!r} brings its own validation examples: remove `validation`")
        if self.objective == "align" and self.keep_language:
            raise ValueError("keep_language belongs to the objective `answers`; `align` trains nothing else: remove it")
        for name in ("seed", "keep_language"):
            if name in self.training:
                raise ValueError(f"{name} is the recipe's own key: give it once, not under `training`")
        return self


def load(path: Path) -> FuseRecipe:
    """Read a recipe file; its relative paths become absolute. Raises InputError with one line."""
    return within(validated(FuseRecipe, read_yaml(path), str(path)), path.parent)


def parse(data: Any, where: str = "recipe") -> FuseRecipe:
    """A recipe from plain data; relative paths count from the current folder."""
    return within(validated(FuseRecipe, data, where), Path())


def within(recipe: FuseRecipe, folder: Path) -> FuseRecipe:
    """The recipe with its paths resolved against `folder`."""

    def at(path: Path | None) -> Path | None:
        return None if path is None else (folder / path.expanduser()).resolve()

    experts = {name: spec.model_copy(update={"file": at(spec.file)}) for name, spec in recipe.experts.items()}
    held = recipe.validation
    beside = folder / recipe.base
    return recipe.model_copy(
        update={
            "base": str(beside.resolve()) if beside.exists() else recipe.base,
            "experts": experts,
            "data": recipe.data.model_copy(update={"file": at(recipe.data.file)}),
            "validation": held and held.model_copy(update={"file": at(held.file)}),
        }
    )
