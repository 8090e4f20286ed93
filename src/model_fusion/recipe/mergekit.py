"""Mergekit's other spellings, turned into ours before a recipe is read."""

from collections.abc import Mapping
from typing import Any

from model_fusion.errors import InputError
from model_fusion.recipe.reading import nearest

_MODEL_KEYS = ("model", "base_model")


def translated(data: Any, where: str) -> Any:
    """Plain recipe data with models as texts (mergekit also takes them apart: `model: {path: …, revision: …}`), and
    `random_seed` as `seed`. Raises `InputError` for what mergekit reads and never uses."""
    if not isinstance(data, dict):
        return data
    if "random_seed" in data:
        if "seed" in data:
            raise InputError(f"{where}: seed and random_seed are one thing: give one of them")
        data = {"seed" if key == "random_seed" else key: value for key, value in data.items()}
    named = data.get("merges")
    if isinstance(named, dict):
        data = {
            **data,
            "merges": {name: translated(inner, f"{where}: merge {name!r}") for name, inner in named.items()},
        }
    return _inside(data, where)


def _inside(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_inside(item, where) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("residual_weight") is not None:
        raise InputError(f"{where}: residual_weight does nothing, in mergekit neither: remove it")
    return {
        key: _text(item, where) if key in _MODEL_KEYS and isinstance(item, dict) else _inside(item, where)
        for key, item in value.items()
        if key != "residual_weight"
    }


def _text(given: Mapping[str, Any], where: str) -> str:
    """`path@revision+lora` of a model that is taken apart."""
    inner = given if "path" in given else given.get("model")
    _check(given, {"path", "revision"} if "path" in given else {"model", "lora"}, where)
    text = _place(inner, where)
    lora = given.get("lora")
    return text if lora is None else f"{text}+{_place(lora, where)}"


def _place(given: Any, where: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, dict) or not isinstance(given.get("path"), str):
        raise InputError(f"{where}: model {given!r}: give a text, or a mapping with `path`")
    _check(given, {"path", "revision"}, where)
    revision = given.get("revision")
    return given["path"] if revision is None else f"{given['path']}@{revision}"


def _check(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for key, value in given.items():
        if key not in known and value is not None:
            raise InputError(f"{where}: model {dict(given)!r}: unknown key {str(key)!r}; {nearest(str(key), known)}")
