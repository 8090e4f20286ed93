"""What a mix recipe may say: our YAML, and mergekit-moe's as it is. Knows no file but the recipe's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model_fusion.errors import InputError
from model_fusion.recipe.merge import Dtype
from model_fusion.recipe.reading import mistake, nearest, yaml_documents

GateName = Literal[
    "auto", "ridge", "prefix", "mean", "hidden", "hidden_avg", "cheap_embed", "random", "uniform_random", "gateless"
]
PROMPTED = ("hidden", "hidden_avg", "cheap_embed")
_MERGEKIT_ARCHITECTURES = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpertEntry(_Strict):
    """One expert. `texts`: files or folders of its domain; `prompts`: short texts of it (mergekit's
    positive_prompts), from which `negative_prompts` are subtracted by mergekit's gates. `noise_scale` and
    `residual_scale` are mergekit's: Gaussian noise on the FFN, and a factor on its output."""

    model: str
    name: str | None = None
    texts: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    noise_scale: float | None = Field(default=None, ge=0)
    residual_scale: float | None = None


class MixRecipe(_Strict):
    """A mix: whose blocks become experts, what the rest of the model is, and how the gates start.

    mix: what becomes experts; q_proj (Llama only) needs a class of our own to load.
    trunk: everything that is no expert, from `base_model`, the experts' average, or from the base after checking
    that every expert's is identical. attention_lora: what becomes of LoRA matrices outside the FFN.
    gate "auto" is ridge where every expert has texts or prompts, else gateless.
    """

    base_model: str
    experts: tuple[ExpertEntry, ...] = Field(min_length=1)
    mix: Literal["ffn", "q_proj"] = "ffn"
    experts_per_token: int | None = Field(default=None, ge=1)
    gate: GateName = "auto"
    trunk: Literal["base", "average", "require_equal"] = "base"
    attention_lora: Literal["refuse", "average", "base"] = "refuse"
    shared_experts: tuple[ExpertEntry, ...] = ()
    layers: tuple[int, ...] | None = None
    architecture: str = "auto"
    dtype: Dtype | None = None
    calibration_tokens: int = Field(default=16384, ge=1)
    ridge: float = Field(default=1e-3, gt=0)
    statistics: str | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _whole(self) -> "MixRecipe":
        total, names = len(self.experts), self.names()
        if self.experts_per_token is not None and self.experts_per_token > total:
            raise ValueError(f"experts_per_token {self.experts_per_token} is more than the {total} experts")
        if self.gate == "gateless" and self.experts_per_token not in (None, total):
            raise ValueError(f"gate gateless runs every expert: set experts_per_token to {total}, or leave it out")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two experts are named {twice!r}: give each its own name")
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise ValueError("layers names a layer twice")
        if self.gate in ("ridge", "prefix", "mean"):
            bare = next((n for n, e in zip(names, self.experts, strict=True) if not (e.texts or e.prompts)), None)
            if bare is not None:
                raise ValueError(f"gate {self.gate} needs texts or prompts for expert {bare!r}")
        if self.gate == "prefix" and self.statistics is not None:
            raise ValueError("gate prefix keeps no statistics: leave statistics out")
        if self.gate in PROMPTED:
            bare = next((n for n, e in zip(names, self.experts, strict=True) if not e.prompts), None)
            if bare is not None:
                raise ValueError(f"gate {self.gate} needs prompts (positive_prompts) for expert {bare!r}")
        return self

    def names(self) -> list[str]:
        """The experts' names, which are also the names of their domains."""
        return [entry.name or f"expert{i}" for i, entry in enumerate(self.experts)]

    def chosen_gate(self) -> str:
        """The gate's name with "auto" resolved."""
        if self.gate != "auto":
            return self.gate
        return "ridge" if all(e.texts or e.prompts for e in self.experts) else "gateless"

    def top_k(self) -> int:
        """Experts that run for a token."""
        total = len(self.experts)
        return total if self.chosen_gate() == "gateless" else self.experts_per_token or min(2, total)

    def model_names(self) -> list[str]:
        """Every model's text, the base first."""
        entries = (*self.experts, *self.shared_experts)
        return list(dict.fromkeys([self.base_model, *(entry.model for entry in entries)]))


def load(path: Path) -> MixRecipe:
    """Read a recipe file. Raises `InputError` with one line: what is wrong, where, what would be right."""
    documents = yaml_documents(path)
    if len(documents) != 1:
        raise InputError(f"{path}: expected one YAML document, found {len(documents)}; write one recipe a file")
    return parse(documents[0], str(path))


def parse(data: Any, where: str = "recipe") -> MixRecipe:
    """A recipe from plain data, in either dialect."""
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected keys such as base_model and experts")
    translated = _from_mergekit(data, where)
    _check_keys(translated, MixRecipe, where)
    for key in ("experts", "shared_experts"):
        entries = translated.get(key) or []
        if not isinstance(entries, list):
            raise InputError(f"{where}: {key}: give a list, an entry a model, not {entries!r}")
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise InputError(f"{where}: {key}[{i}]: expected keys such as model, not {entry!r}")
            _check_keys(entry, ExpertEntry, f"{where}: {key}[{i}]")
            single = next((k for k in ("texts", "prompts", "negative_prompts") if isinstance(entry.get(k), str)), None)
            if single is not None:
                raise InputError(f"{where}: {key}[{i}]: {single}: give a list, such as [{entry[single]!r}]")
    gates = GateName.__args__  # type: ignore[attr-defined]
    gate = translated.get("gate", "auto")
    if gate not in gates:
        raise InputError(f"{where}: unknown gate {gate!r}; {nearest(str(gate), gates)}")
    try:
        return MixRecipe.model_validate(translated)
    except ValidationError as error:
        raise mistake(error, where) from error


def _from_mergekit(data: dict[str, Any], where: str) -> dict[str, Any]:
    """mergekit-moe's keys as ours; data in our own dialect comes back as it is."""
    experts = data.get("experts")
    listed = [e for e in experts if isinstance(e, dict)] if isinstance(experts, list) else []
    if "gate_mode" not in data and not any("source_model" in entry for entry in listed):
        return data
    result = dict(data)
    result["gate"] = result.pop("gate_mode", "hidden")
    result["experts_per_token"] = result.get("experts_per_token") or 2
    words = {"source_model": "model", "positive_prompts": "prompts"}
    for key in ("experts", "shared_experts"):
        entries = result.get(key) or []
        result[key] = [
            {words.get(k, k): v for k, v in entry.items() if v is not None} if isinstance(entry, Mapping) else entry
            for entry in entries
        ]
    architecture = result.get("architecture")
    if architecture is None:
        result.pop("architecture", None)
    elif architecture in _MERGEKIT_ARCHITECTURES:
        result["architecture"] = _MERGEKIT_ARCHITECTURES[architecture]
    elif architecture == "deepseek":
        raise InputError(f"{where}: architecture deepseek is not built; leave it out to get mixtral or qwen2_moe")
    return result


def _check_keys(data: Mapping[str, Any], kind: type[BaseModel], where: str) -> None:
    for key in data:
        if key not in kind.model_fields:
            raise InputError(f"{where}: unknown key {str(key)!r}; {nearest(str(key), kind.model_fields)}")
