"""The typed schema of an expert's input, so that a chat command, JSON or a recipe can name one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from model_fusion.errors import InputError

FieldType = Literal["int", "float", "bool", "category", "array", "text"]
TRUE_WORDS = ("yes", "true", "1", "on", "usable")
FALSE_WORDS = ("no", "false", "0", "off", "none")


@dataclass(frozen=True)
class Field:
    """One value of an input. `low`/`high` bound numbers; `choices` list a category; `shape` is an array's."""

    name: str
    type: FieldType
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()

    def parse(self, word: str) -> Any:
        """One word of a command line as this field's Python value. Raises InputError naming the field."""
        if self.type == "bool":
            lowered = word.lower()
            if lowered in TRUE_WORDS:
                return True
            if lowered in FALSE_WORDS:
                return False
            raise InputError(f"{self.name}: expected yes or no, got {word!r}")
        if self.type == "category":
            if word not in self.choices:
                raise InputError(f"{self.name}: expected one of {', '.join(self.choices)}, got {word!r}")
            return word
        if self.type == "text":
            return word
        if self.type == "array":
            return self.check(self._read(word))
        try:
            value: int | float = int(word) if self.type == "int" else float(word)
        except ValueError:
            raise InputError(
                f"{self.name}: expected {'a whole' if self.type == 'int' else 'a'} number, got {word!r}"
            ) from None
        return self._bounded(value)

    def _read(self, file: str) -> Any:
        """The array in a .npy file."""
        if not file.endswith(".npy"):
            raise InputError(
                f"{self.name}: an array of shape {list(self.shape)} is given as JSON or as a .npy file, got {file!r}"
            )
        import numpy as np

        try:
            return np.load(file, allow_pickle=False)
        except FileNotFoundError:
            raise InputError(f"{self.name}: {file}: no such file") from None
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"{self.name}: {file}: cannot be read as an array ({str(error).splitlines()[0]})"
            ) from None

    def check(self, value: Any) -> Any:
        """A Python or JSON value as this field's; arrays become float32 numpy arrays of `shape`."""
        if self.type == "array":
            import numpy as np

            try:
                array = np.asarray(value, dtype=np.float32)
            except (TypeError, ValueError):
                raise InputError(f"{self.name}: expected numbers in an array of shape {list(self.shape)}") from None
            if self.shape and array.shape != self.shape:
                raise InputError(f"{self.name}: expected shape {list(self.shape)}, got {list(array.shape)}")
            if not np.isfinite(array).all():
                raise InputError(f"{self.name}: contains NaN or infinity")
            return array
        if self.type in ("category", "text"):
            return self.parse(str(value))
        if self.type == "bool":
            return self.parse(value) if isinstance(value, str) else bool(value)
        if isinstance(value, str):
            return self.parse(value)
        try:
            number: int | float = float(value)
        except (TypeError, ValueError):
            raise InputError(f"{self.name}: expected a number, got {value!r}") from None
        if number != number or number in (float("inf"), float("-inf")):
            raise InputError(f"{self.name}: expected a finite number, got {value!r}")
        if self.type == "int":
            if number != int(number):
                raise InputError(f"{self.name}: expected a whole number, got {value!r}")
            number = int(number)
        return self._bounded(number)

    def _bounded(self, value: int | float) -> int | float:
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise InputError(f"{self.name}: expected {_range(self.low, self.high)}, got {value}")
        return value


@dataclass(frozen=True)
class InputSchema:
    """The fields of one input. An item with several fields is a tuple in their order; with one, the value
    itself."""

    fields: tuple[Field, ...]

    def parse(self, words: Sequence[str]) -> Any:
        """The words of `/expert NAME word word …` as one item."""
        if len(words) != len(self.fields):
            raise InputError(f"expected {len(self.fields)} values ({self}), got {len(words)}")
        return self._item([field.parse(word) for field, word in zip(self.fields, words, strict=True)])

    def check(self, item: Any) -> Any:
        """A Python or JSON item (value, list, tuple or dict by field name) checked and converted."""
        if len(self.fields) == 1:
            value = item[self.fields[0].name] if isinstance(item, dict) else item
            return self.fields[0].check(value)
        if isinstance(item, dict):
            unknown = set(item) - {field.name for field in self.fields}
            missing = [field.name for field in self.fields if field.name not in item]
            if unknown or missing:
                raise InputError(f"expected the fields {self}; missing {missing}, unknown {sorted(unknown)}")
            item = [item[field.name] for field in self.fields]
        if isinstance(item, str) or not hasattr(item, "__len__") or len(item) != len(self.fields):
            raise InputError(f"expected {len(self.fields)} values ({self}), got {item!r}")
        return self._item([field.check(value) for field, value in zip(self.fields, item, strict=True)])

    def words(self, item: Any) -> str:
        """A checked item told in words, every value with its field's name: "pressure 8.5, heat 9, leaking no"."""
        values = [item] if len(self.fields) == 1 else item
        return ", ".join(f"{f.name} {_said(value)}" for f, value in zip(self.fields, values, strict=True))

    def _item(self, values: list[Any]) -> Any:
        return values[0] if len(values) == 1 else tuple(values)

    def to_json(self) -> list[dict[str, Any]]:
        """A JSON list that `from_json` reads back."""
        return [
            {
                "name": f.name,
                "type": f.type,
                "low": f.low,
                "high": f.high,
                "choices": list(f.choices),
                "shape": list(f.shape),
            }
            for f in self.fields
        ]

    @classmethod
    def from_json(cls, data: Sequence[dict[str, Any]]) -> InputSchema:
        return cls(
            tuple(
                Field(
                    d["name"],
                    d["type"],
                    d.get("low"),
                    d.get("high"),
                    tuple(d.get("choices", ())),
                    tuple(d.get("shape", ())),
                )
                for d in data
            )
        )

    def __str__(self) -> str:
        return ", ".join(f"{f.name} ({f.type}{' ' + str(list(f.shape)) if f.shape else ''})" for f in self.fields)


def _said(value: Any) -> str:
    """One value in words: numbers of an array row by row."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if getattr(value, "ndim", 0) > 1:
        return "; ".join(_said(row) for row in value)
    return " ".join(f"{number:g}" for number in value) if hasattr(value, "__len__") else f"{value:g}"


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
