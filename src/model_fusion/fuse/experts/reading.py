"""From what a caller hands in to checked items, and from items to one array. It knows no expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_fusion.errors import InputError
from model_fusion.fuse.experts.schema import Field, InputSchema


def is_frame(inputs: Any) -> bool:
    """True for a pandas DataFrame (or a frame that looks like one), without importing pandas."""
    return hasattr(inputs, "columns") and hasattr(inputs, "iloc")


def frame_columns(frame: Any, names: Sequence[str]) -> Any:
    """The columns `names` of a frame, in that order. Raises InputError naming the missing ones."""
    missing = [name for name in names if name not in frame.columns]
    if missing:
        raise InputError(
            f"the DataFrame lacks the columns {', '.join(map(str, missing))}; it has {list(frame.columns)}"
        )
    return frame[list(names)]


def checked_items(inputs: Sequence[Any], schema: InputSchema) -> list[Any]:
    """B items that fit `schema`. Raises InputError naming the first row that does not."""
    if isinstance(inputs, str | bytes | dict):
        raise InputError(f"expected a sequence of inputs, got one {type(inputs).__name__}; put it in a list")
    if is_frame(inputs):
        names = [field.name for field in schema.fields]
        inputs = [tuple(row) for row in frame_columns(inputs, names).itertuples(index=False)]
        if len(names) == 1:
            inputs = [row[0] for row in inputs]
    if len(inputs) == 0:
        raise InputError("expected at least one input, got none")
    items = []
    for row, item in enumerate(inputs):
        try:
            items.append(schema.check(item))
        except InputError as error:
            raise InputError(f"row {row}: {error}") from None
    return items


def stack(items: Sequence[Any], schema: InputSchema, dtype: type[np.floating[Any]] = np.float32) -> NDArray[Any]:
    """The default preprocessing: float32 [B, fields], or [B, *shape] for one array field.

    A category counts as its position in `choices`, a bool as 0 or 1; several fields with an array among them
    are flattened and joined. Raises InputError for text, which has no numbers of its own.
    """
    if len(schema.fields) == 1:
        column = [_numbers(schema.fields[0], item, dtype) for item in items]
        array = _join(column)
        return array[:, None] if array.ndim == 1 else array
    rows = [
        np.concatenate(
            [_numbers(field, value, dtype).ravel() for field, value in zip(schema.fields, item, strict=True)]
        )
        for item in items
    ]
    return _join(rows)


def probe_item(schema: InputSchema) -> Any:
    """One legal item, made up from bounds, choices and shapes, to learn the width of an expert's features."""
    values = [_probe_value(field) for field in schema.fields]
    return values[0] if len(values) == 1 else tuple(values)


def _join(rows: list[NDArray[Any]]) -> NDArray[Any]:
    for row, array in enumerate(rows):
        if array.shape != rows[0].shape:
            raise InputError(f"row {row}: expected shape {list(rows[0].shape)} as in row 0, got {list(array.shape)}")
    return np.stack(rows)


def _numbers(field: Field, value: Any, dtype: type[np.floating[Any]]) -> NDArray[Any]:
    if field.type == "text":
        raise InputError(f"{field.name}: text has no numbers of its own; give the expert a preprocess function")
    if field.type == "category":
        value = field.choices.index(value)
    return np.asarray(value, dtype=dtype)


def _probe_value(field: Field) -> Any:
    if field.type == "array":
        if not field.shape:
            raise InputError(f"{field.name}: give the array's shape in its Field, or the expert's feature_shape")
        return np.zeros(field.shape, dtype=np.float32)
    if field.type == "category":
        return field.choices[0]
    if field.type == "text":
        return "text"
    if field.type == "bool":
        return False
    value = 0.0
    if field.low is not None:
        value = max(value, field.low)
    if field.high is not None:
        value = min(value, field.high)
    return int(np.ceil(value)) if field.type == "int" else value
