"""A recipe's parameters against those that its method has: names, defaults, places where they change nothing."""

import warnings
from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from model_fusion.errors import InputError
from model_fusion.merge.methods import all_methods
from model_fusion.recipe.merge import MergeRecipe, ModelEntry, SliceSource
from model_fusion.recipe.reading import nearest

if TYPE_CHECKING:
    from model_fusion.merge.plan import Method

# mergekit options that change its memory use, not the result
_WITHOUT_EFFECT = {"int8_mask"}


def names_of(kind: Any) -> list[str]:
    """The fields of a parameter dataclass."""
    return [own.name for own in fields(kind)] if kind is not None else []


def defaults(method: "Method") -> dict[str, Any]:
    """Parameter → the value it has where a recipe is silent, as recipes spell it."""
    return defaults_of(method.params) | defaults_of(method.model_params)


def defaults_of(kind: Any) -> dict[str, Any]:
    """The same of one parameter dataclass."""
    every = fields(kind) if kind is not None else ()
    return {own.name.removesuffix("_"): own.default for own in every if own.default is not MISSING}


def check_parameters(recipe: MergeRecipe, method: "Method") -> None:
    """Names of parameters against the method's own, before any model is looked for. Warns of those that stand where
    they change nothing."""
    each = {name.removesuffix("_") for name in names_of(method.model_params)}
    whole = {name.removesuffix("_") for name in names_of(method.params)}
    valid = {*each, *whole, *_WITHOUT_EFFECT}
    for part in recipe.parts():
        for name in part.parameters:
            if name not in valid:
                raise InputError(f"{recipe.merge_method} has no parameter {name!r}{_advice(name, valid)}")
            if isinstance(part, ModelEntry | SliceSource) and name in whole - each - _WITHOUT_EFFECT:
                text = f"{name} under {part.model} changes nothing, as in mergekit: it belongs to the whole merge"
                warnings.warn(f"{recipe.merge_method}: {text}", stacklevel=2)


def _advice(name: str, valid: Collection[str]) -> str:
    owners = [m.name for m in all_methods() for kind in (m.params, m.model_params) if name in defaults_of(kind)]
    if owners:
        more = " …" if len(owners) > 3 else ""
        return f", which belongs to {', '.join(owners[:3])}{more}: remove it"
    return f"; {nearest(name, valid)}" if valid else " (it takes none)"
