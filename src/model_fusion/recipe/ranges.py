"""Numbers of a recipe that are marked as ranges, for a search to fill.

`weight: {range: [0, 1]}` in place of a number; beside it `log: true`, `step: 0.05`, or a `name`, by which several
places share one value. `{choices: [ties, linear]}` takes one of the words or numbers. A gradient may hold ranges, and
so may a filter's value: both are lists, and no list means a range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from model_fusion.errors import InputError
from model_fusion.recipe.reading import nearest

Value = float | int | str | bool
_KEYS = ("range", "log", "step", "choices", "name")


@dataclass(frozen=True)
class Range:
    """Numbers in [low, high]. `log`: drawn evenly in the logarithm. `step`: only low, low + step, … up to high; where
    it and both ends are whole, so are the numbers."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Are the numbers integers?"""
        return isinstance(self.step, int) and isinstance(self.low, int) and isinstance(self.high, int)

    def ends(self) -> tuple[Value, Value]:
        return self.low, self.high

    def points(self, count: int) -> list[Value]:
        """Every step, or `count` numbers spread evenly, both ends among them."""
        if self.step is not None:
            found = [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]
            return list(found)
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            inner = [math.exp(low + (high - low) * i / (count - 1)) for i in range(1, count - 1)]
        else:
            inner = [self.low + (self.high - self.low) * i / (count - 1) for i in range(1, count - 1)]
        return [float(self.low), *inner, float(self.high)]


@dataclass(frozen=True)
class Choices:
    """One of a few words or numbers."""

    options: tuple[Value, ...]

    def ends(self) -> tuple[Value, Value]:
        return self.options[0], self.options[-1]

    def points(self, count: int) -> list[Value]:
        return list(self.options)


Free = Range | Choices


def find(data: Any, where: str = "recipe") -> dict[str, Free]:
    """Every range in plain recipe data, by its `name`, or by its place (`models[0].parameters.weight`).

    **Raises** InputError for a range that holds nothing, and for two different ranges of one name.
    """
    found: dict[str, Free] = {}
    for place, mark in _marks(data, ""):
        free = _read(mark, f"{where}: {place}")
        name = str(mark.get("name", place))
        if found.setdefault(name, free) != free:
            raise InputError(f"{where}: {place}: {name!r} is another range elsewhere: give one range a name")
    return found


def fill(data: Any, values: Mapping[str, Value], place: str = "") -> Any:
    """The recipe with every range replaced by its value; the data itself stays as it is."""
    if _marked(data):
        return values[str(data.get("name", place))]
    if isinstance(data, Mapping):
        return {key: fill(item, values, _inner(place, key)) for key, item in data.items()}
    if isinstance(data, list):
        return [fill(item, values, f"{place}[{i}]") for i, item in enumerate(data)]
    return data


def _marked(data: Any) -> bool:
    return isinstance(data, Mapping) and ("range" in data or "choices" in data)


def _inner(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _marks(data: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if _marked(data):
        yield place, data
    elif isinstance(data, Mapping):
        for key, item in data.items():
            yield from _marks(item, _inner(place, key))
    elif isinstance(data, list):
        for i, item in enumerate(data):
            yield from _marks(item, f"{place}[{i}]")


def _read(mark: Mapping[str, Any], where: str) -> Free:
    odd = next((str(key) for key in mark if key not in _KEYS), None)
    if odd is not None:
        raise InputError(f"{where}: unknown key {odd!r} in a range; {nearest(odd, _KEYS)}")
    if "range" in mark and "choices" in mark:
        raise InputError(f"{where}: give either range or choices (one of them, not both)")
    return _choices(mark, where) if "choices" in mark else _range(mark, where)


def _choices(mark: Mapping[str, Any], where: str) -> Choices:
    options = mark["choices"]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, Value) for o in options):
        raise InputError(f"{where}: choices {options!r}: give a list of at least two numbers or words")
    if len(set(options)) < len(options):
        raise InputError(f"{where}: choices {options!r}: one of them stands there twice")
    if "log" in mark or "step" in mark:
        raise InputError(f"{where}: log and step belong to a range, not to choices")
    return Choices(tuple(options))


def _range(mark: Mapping[str, Any], where: str) -> Range:
    ends, log, step = mark["range"], mark.get("log", False), mark.get("step")
    if not isinstance(ends, list) or len(ends) != 2 or not all(_number(end) for end in ends):
        raise InputError(f"{where}: range {ends!r}: give [lowest, highest]")
    low, high = ends
    if low >= high:
        raise InputError(f"{where}: range [{low}, {high}] holds nothing: give [lowest, highest]")
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        raise InputError(f"{where}: log is true or false, and goes with a lowest above 0 and without a step")
    if step is not None:
        if not _number(step) or not 0 < step <= high - low:
            raise InputError(f"{where}: step {step!r} must be above 0 and at most {high - low:g}")
        high = low + math.floor((high - low) / step + 1e-9) * step  # the last step inside
    return Range(low, high, log, step)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
