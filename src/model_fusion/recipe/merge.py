"""What a merge recipe may say: mergekit's YAML, read strictly.

Unknown keys are errors that name the nearest valid key. Knows no file but the recipe's own.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from model_fusion.errors import InputError
from model_fusion.recipe.documents import in_order, joined
from model_fusion.recipe.mergekit import translated
from model_fusion.recipe.parameters import check_value
from model_fusion.recipe.reading import mistake, nearest, yaml_documents
from model_fusion.recipe.tokenizer import ModelToken, TokenEmbedding, TokenizerSpec, Zero

Dtype = Literal["float32", "float16", "bfloat16"]
Parameters = dict[str, Any]
PATHS = ("model", "base_model", "tokenizer_source", "statistics")
"""Keys whose texts are paths, where they are no hub ids."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: Parameters = Field(default_factory=dict)

    @field_validator("parameters", mode="before")
    @classmethod
    def _values(cls, value: Any) -> Any:
        if value is None:
            return {}
        if isinstance(value, dict):
            for name, item in value.items():
                check_value(str(name), item)
        return value


class ModelEntry(_Part):
    """One input model of the whole-model form. `statistics`: the file that a data-based method takes of it."""

    model: str
    statistics: str | None = None


class SliceSource(_Part):
    """Layers [start, end) of one model. `statistics` as of a whole model."""

    model: str
    layer_range: tuple[int, int]
    statistics: str | None = None

    @model_validator(mode="after")
    def _range(self) -> "SliceSource":
        start, end = self.layer_range
        if start < 0 or end <= start:
            raise ValueError(f"layer_range [{start}, {end}] of {self.model} is empty: give [first, last + 1]")
        return self


class Slice(_Part):
    """Output layers made from equally long ranges of one or more models; `base_model` replaces the recipe's here."""

    sources: list[SliceSource] = Field(min_length=1)
    base_model: str | None = None

    @model_validator(mode="after")
    def _lengths(self) -> "Slice":
        lengths = {s.layer_range[1] - s.layer_range[0] for s in self.sources}
        if len(lengths) > 1:
            raise ValueError(f"sources of one slice have layer ranges of different lengths {sorted(lengths)}")
        return self


class Module(_Part):
    """One part of a model (its text decoder, its vision tower …), merged by models or slices of its own."""

    models: list[ModelEntry] | None = Field(default=None, min_length=1)
    slices: list[Slice] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _one_form(self) -> "Module":
        if (self.models is None) == (self.slices is None):
            raise ValueError("give either `models` or `slices` (one of them, not both)")
        return self


class MergeRecipe(_Part):
    """A merge: the method, its models (or slices of them), and parameters at every level.

    `seed` (ours) keys the random methods; it is recorded in the lineage. `merges` are made first; models call them
    by name (a file of several documents becomes this).
    """

    merge_method: str
    models: list[ModelEntry] | None = None
    slices: list[Slice] | None = None
    modules: dict[str, Module] | None = None
    base_model: str | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    tokenizer: TokenizerSpec | None = None
    chat_template: str | None = None
    name: str | None = None
    seed: int = 0
    merges: dict[str, "MergeRecipe"] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_form(self) -> "MergeRecipe":
        if sum(form is not None for form in (self.models, self.slices, self.modules)) != 1:
            raise ValueError("give either `models` or `slices` (one of them, not both), or `modules`")
        if not (self.models or self.slices or self.modules):
            raise ValueError("the recipe names no models")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("give either `tokenizer` or `tokenizer_source` (one of them, not both)")
        return self

    def tokenizer_spec(self) -> TokenizerSpec | None:
        """What the recipe says of the output's tokenizer, in whichever way (`model:NAME` is an old one)."""
        if self.tokenizer_source:
            return TokenizerSpec(source=self.tokenizer_source.removeprefix("model:"))
        return self.tokenizer

    def parts(self) -> list[_Part]:
        """Every part that can hold parameters: itself, modules, models, slices and their sources."""
        owners: list[MergeRecipe | Module] = [self, *(self.modules or {}).values()]
        slices = [part for owner in owners for part in owner.slices or []]
        models = [entry for owner in owners for entry in owner.models or []]
        return [*owners, *models, *slices, *(source for part in slices for source in part.sources)]

    def statistics(self) -> list[str]:
        """Every file of statistics that it names, each once."""
        sources = [part for part in self.parts() if isinstance(part, ModelEntry | SliceSource)]
        return list(dict.fromkeys(source.statistics for source in sources if source.statistics is not None))

    def order(self) -> list[str]:
        """Names of `merges`, each after those it uses."""
        return in_order({name: inner.model_names() for name, inner in self.merges.items()}, self.model_names())

    def model_names(self) -> list[str]:
        """Every model's text in order of appearance, the base last if it appears nowhere else."""
        found = [part.model for part in self.parts() if isinstance(part, ModelEntry | SliceSource)]
        found += [part.base_model for part in self.parts() if isinstance(part, Slice) and part.base_model]
        if self.base_model:
            found.append(self.base_model)
        return list(dict.fromkeys(found))


def load(path: Path) -> MergeRecipe:
    """Read a recipe file. Raises `InputError` with one line: what is wrong, where, what would be right."""
    documents = yaml_documents(path)
    return parse(joined([d for d in documents if d is not None] or [None], str(path)), str(path))


def parse(data: Any, where: str = "recipe") -> MergeRecipe:
    """A recipe from plain data."""
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected keys such as merge_method and models")
    data = translated(data, where)
    named = data.get("merges")
    for name, inner in (named if isinstance(named, dict) else {}).items():
        place = f"{where}: merge {str(name)!r}"
        if isinstance(inner, dict) and inner.get("merges"):
            raise InputError(f"{place}: named merges stand beside each other, not inside one another")
        _check_document(inner, place)
    _check_document(data, where)
    try:
        recipe = MergeRecipe.model_validate(data)
    except ValidationError as error:
        raise mistake(error, where) from error
    recipe.order()
    return recipe


def _check_document(data: Any, where: str) -> None:
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected keys such as merge_method and models")
    _check_keys(data, MergeRecipe, where)
    _check_models(data, where)
    modules = data.get("modules")
    for key, part in (modules if isinstance(modules, dict) else {}).items():
        if isinstance(part, dict):
            _check_keys(part, Module, f"{where}: modules.{key}")
            _check_models(part, f"{where}: modules.{key}")
    _check_tokenizer(data.get("tokenizer"), where)


def _check_models(data: dict[str, Any], where: str) -> None:
    for i, entry in enumerate(_items(data, "models", where, "`model: a`")):
        _check_keys(entry, ModelEntry, f"{where}: models[{i}]")
    for i, part in enumerate(_items(data, "slices", where, "`sources: [{model: a, layer_range: [0, 8]}]`")):
        place = f"{where}: slices[{i}]"
        _check_keys(part, Slice, place)
        for j, source in enumerate(_items(part, "sources", place, "`{model: a, layer_range: [0, 8]}`")):
            _check_keys(source, SliceSource, f"{place}.sources[{j}]")


def _check_tokenizer(data: Any, where: str) -> None:
    if not isinstance(data, dict):
        return
    _check_keys(data, TokenizerSpec, f"{where}: tokenizer")
    tokens = data.get("tokens")
    for token, entry in (tokens if isinstance(tokens, dict) else {}).items():
        place = f"{where}: tokenizer.tokens[{token!r}]"
        if not isinstance(entry, dict):
            raise InputError(f"{place}: expected a source (a model, kind: zero or kind: model_token)")
        _check_keys(entry, TokenEmbedding, place)
        source = entry.get("source")
        if isinstance(source, dict):
            kinds: dict[str, type[BaseModel]] = {"zero": Zero, "model_token": ModelToken}
            kind = str(source.get("kind"))
            if kind not in kinds:
                raise InputError(f"{place}: unknown kind {kind!r}; {nearest(kind, kinds)}")
            _check_keys(source, kinds[kind], place)


def _items(data: dict[str, Any], key: str, where: str, example: str) -> list[dict[str, Any]]:
    value = data.get(key)
    if value is not None and not isinstance(value, list):
        raise InputError(f"{where}: {key}: expected a list, with entries such as {example}")
    for i, item in enumerate(value or []):
        if not isinstance(item, dict):
            raise InputError(f"{where}: {key}[{i}]: expected a mapping such as {example}, got {item!r}")
    return value or []


def _check_keys(data: dict[str, Any], kind: type[BaseModel], where: str) -> None:
    for key in data:
        if key not in kind.model_fields:
            raise InputError(f"{where}: unknown key {str(key)!r}; {nearest(str(key), kind.model_fields)}")
