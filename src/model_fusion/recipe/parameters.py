"""Parameter values of a recipe: scalars, gradients over layers, and lists of name filters."""

from collections.abc import Iterator, Sequence
from typing import Any

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
