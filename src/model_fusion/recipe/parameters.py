"""Parameter values of a recipe: scalars, gradients over layers, and lists of name filters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model_fusion.errors import InputError

Scalar = float | int | bool | str


def filters_of(value: Any) -> Iterator[str]:
    """The name filters that a parameter value holds."""
    if isinstance(value, list):
        for item in value:
            if isinstance(item, dict) and item.get("filter") not in (None, "*"):
                yield str(item["filter"])


def check_value(name: str, value: Any) -> None:
    """Raise `InputError` for a shape of value that no tensor could use."""
    if isinstance(value, (bool, int, float, str)):
        return
    if isinstance(value, list) and value:
        if all(isinstance(item, dict) for item in value):
            for item in value:
                unknown = sorted(set(item) - {"filter", "value"})
                if unknown or "value" not in item:
                    raise InputError(f"parameter {name!r}: a filter entry has `filter` and `value`, not {item}")
                check_value(name, item["value"])
            return
        if all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value):
            return
    raise InputError(f"parameter {name!r}: {value!r} is neither a number, a list of numbers, nor filters")


def evaluate(value: Any, tensor: str, position: float) -> Scalar | None:
    """The value for one tensor. `position` in [0, 1] is where the tensor's layer lies (0 first, 1 last).

    None when the value is a list of filters and none matches: the next level of the recipe then applies.
    """
    if isinstance(value, list):
        if value and isinstance(value[0], dict):
            for item in value:
                wanted = item.get("filter")
                if wanted in (None, "*") or str(wanted) in tensor:
                    return evaluate(item["value"], tensor, position)
            return None
        return _gradient(value, position)
    return value  # type: ignore[no-any-return]


def _gradient(values: Sequence[float], position: float) -> float:
    if len(values) == 1:
        return values[0]
    scaled = min(max(position, 0.0), 1.0) * (len(values) - 1)
    low = min(int(scaled), len(values) - 2)
    share = scaled - low
    return values[low] * (1 - share) + values[low + 1] * share


@cache
def _kinds(kind: type) -> dict[str, list[Any]]:
    """Field of a parameter dataclass → the types it may have, and the words."""
    return {name: _flat(hint) for name, hint in get_type_hints(kind).items()}


def _flat(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [kind for part in get_args(hint) for kind in _flat(part)] or [hint]


def fitted(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values in the types that the fields of `kind` have: 10.0 for a whole number, 1 for a truth value and a
    number in quotes are understood, as in mergekit. Raises `InputError` for other types and words, NaN and Inf."""
    return {name: _fit(name, value, _kinds(kind)[name]) for name, value in given.items()}


def _fit(name: str, value: Any, kinds: Sequence[Any]) -> Any:
    number = _number(value)
    if value is None and type(None) in kinds:
        return None
    if float in kinds and number is not None:
        return number
    if int in kinds and number is not None and number.is_integer():
        return int(number)
    if bool in kinds and value in (True, False):
        return bool(value)
    if value in [word for word in kinds if isinstance(word, str)] or (str in kinds and isinstance(value, str)):
        return value
    wanted = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    words = [wanted.get(kind, repr(kind)) for kind in kinds if kind is not type(None)]
    raise InputError(f"{name.removesuffix('_')} must be {' or '.join(words)}, got {value!r}")


def _number(value: Any) -> float | None:
    """A finite number, or one in quotes."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
