"""What a twin recipe may say: the shared model, the experts with the text that tells them apart, the rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from model_fusion.recipe.merge import PATHS
from model_fusion.recipe.strict import Strict, read_yaml, validated

_PATHS = (*PATHS, "base", "texts")


class SharedSpec(Strict):
    """θ*: a `model` as it is; or `base` + `lambda` · the sum of the experts' changes; or a merge recipe in `merge`."""

    model: str | None = None
    base: str | None = None
    lambda_: float | None = Field(default=None, alias="lambda", gt=0)
    merge: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> SharedSpec:
        if sum(given is not None for given in (self.model, self.base, self.merge)) != 1:
            raise ValueError("give one of `model`, `base` (with lambda) and `merge` (a merge recipe)")
        if (self.base is None) != (self.lambda_ is None):
            raise ValueError("base and lambda belong together: base + lambda · Σ(expert − base)")
        return self


class TwinExpert(Strict):
    """An expert, and files or folders of text like what it should answer."""

    model: str
    name: str = Field(min_length=1)
    texts: list[str] = Field(min_length=1)


class RouterSpec(Strict):
    """window: tokens a sequence; tokens: at most so many of an expert's training text, a quarter as many to validate
    on; temperature: the trained router's logits are divided by it, so that above 1 it mixes experts more evenly; the
    rest as in `TrainSettings`."""

    window: int = Field(default=64, ge=2)
    tokens: int = Field(default=20_000, ge=2)
    steps: int = Field(default=400, ge=1)
    batch_size: int = Field(default=64, ge=2)
    learning_rate: float = Field(default=1e-3, gt=0)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class TwinRecipe(Strict):
    """`rank`: the share of each matrix's smaller side that an expert's difference keeps."""

    shared: SharedSpec
    experts: list[TwinExpert] = Field(min_length=2)
    rank: float = Field(default=0.1, gt=0, le=1)
    router: RouterSpec = RouterSpec()
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    seed: int = Field(default=0, ge=0)

    @field_validator("shared", mode="before")
    @classmethod
    def _shared_model(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _names(self) -> TwinRecipe:
        names = [expert.name for expert in self.experts]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two experts are called {twice!r}: give each its own name")
        return self

    def merge_recipe(self) -> dict[str, Any]:
        """The merge that gives the shared model."""
        out = {"dtype": "float32", "out_dtype": self.dtype}
        if self.shared.merge is not None:
            return {**out, **self.shared.merge}
        if self.shared.model is not None:
            return {"merge_method": "passthrough", "models": [{"model": self.shared.model}], **out}
        return {
            "merge_method": "task_arithmetic",
            "base_model": self.shared.base,
            "models": [{"model": expert.model, "parameters": {"weight": 1.0}} for expert in self.experts],
            "parameters": {"lambda": self.shared.lambda_, "normalize": False},
            **out,
        }


def load(path: Path) -> TwinRecipe:
    """Read a recipe file; its relative paths count from the current folder, else from its own. Raises InputError."""
    return within(validated(TwinRecipe, read_yaml(path), str(path)), path.parent)


def parse(data: Any, where: str = "recipe") -> TwinRecipe:
    """A recipe from plain data; relative paths count from the current folder."""
    return validated(TwinRecipe, data, where)


def within(recipe: TwinRecipe, folder: Path) -> TwinRecipe:
    """The recipe with its paths resolved against `folder`, where they are not found from the current one."""

    def at(text: str) -> str:
        if Path(text).expanduser().exists():
            return text
        if (folder / text).exists():
            return str((folder / text).resolve())
        base, plus, adapter = text.partition("+")
        return f"{at(base)}+{at(adapter)}" if plus else text

    def inside(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: inside(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [inside(inner, key) for inner in value]
        return at(value) if isinstance(value, str) and key in _PATHS else value

    return validated(TwinRecipe, inside(recipe.model_dump(by_alias=True, exclude_none=True)), "recipe")
