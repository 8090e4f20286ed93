"""The input schema: words and JSON become checked items, or one line that names the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_fusion.errors import InputError
from model_fusion.fuse.experts import Field, InputSchema
from model_fusion.fuse.experts.reading import checked_items, probe_item, stack

TABLE = InputSchema((Field("total", "int", 4, 21), Field("dealer", "int", 1, 10), Field("ace", "bool")))
PICTURE = InputSchema((Field("picture", "array", shape=(2, 3)),))
COLOUR = Field("colour", "category", choices=("red", "black"))


def test_words_become_an_item() -> None:
    assert TABLE.parse(["16", "10", "no"]) == (16, 10, False)
    assert InputSchema((Field("rate", "float"),)).parse(["0.5"]) == 0.5
    assert InputSchema((COLOUR,)).parse(["red"]) == "red"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["16", "10"], "expected 3 values"),
        (["16.5", "10", "no"], "total: expected a whole number"),
        (["3", "10", "no"], "total: expected 4 to 21, got 3"),
        (["16", "10", "maybe"], "ace: expected yes or no"),
    ],
)
def test_bad_words_name_the_field(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TABLE.parse(words)


def test_items_come_as_tuple_list_dict_or_value() -> None:
    expected = (16, 10, False)
    assert TABLE.check((16, 10, False)) == expected
    assert TABLE.check([16.0, "10", 0]) == expected
    assert TABLE.check({"ace": False, "total": 16, "dealer": 10}) == expected
    assert PICTURE.check([[1, 2, 3], [4, 5, 6]]).dtype == np.float32
    assert PICTURE.check({"picture": np.zeros((2, 3))}).shape == (2, 3)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((16, 10), "expected 3 values"),
        ("16 10 no", "expected 3 values"),
        ((float("nan"), 10, False), "total: expected a finite number"),
        ({"total": 16, "dealer": 10, "colour": 1}, r"missing \['ace'\], unknown \['colour'\]"),
    ],
)
def test_bad_items_name_the_field(item: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TABLE.check(item)


def test_arrays_have_a_shape_and_finite_numbers() -> None:
    with pytest.raises(InputError, match=r"picture: expected shape \[2, 3\], got \[3, 2\]"):
        PICTURE.check(np.zeros((3, 2)))
    with pytest.raises(InputError, match="NaN or infinity"):
        PICTURE.check(np.full((2, 3), np.nan))
    with pytest.raises(InputError, match="given as JSON"):
        PICTURE.parse(["1"])


def test_an_array_comes_from_a_file(tmp_path: Path) -> None:
    file, wrong, text, code = (tmp_path / f"{name}.npy" for name in ("a", "wrong", "text", "code"))
    np.save(file, np.arange(6).reshape(2, 3))
    np.save(wrong, np.zeros(6))
    text.write_text("no array")
    np.save(code, np.array([[{}, 1, 2]] * 2), allow_pickle=True)
    assert PICTURE.parse([str(file)]).tolist() == [[0, 1, 2], [3, 4, 5]]
    for given, message in (
        (wrong, r"expected shape \[2, 3\], got \[6\]"),
        (text, "cannot be read as an array"),
        (code, "cannot be read as an array"),  # objects would be unpickled, which runs code
        (tmp_path / "none.npy", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            PICTURE.parse([str(given)])


def test_json_roundtrip() -> None:
    schema = InputSchema((*TABLE.fields, *PICTURE.fields, COLOUR))
    assert InputSchema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    altered = [{**field, "high": 5} for field in schema.to_json()]
    assert InputSchema.from_json(altered) != schema


def test_stack_is_fields_in_order_or_arrays() -> None:
    assert stack([(16, 10, False), (4, 1, True)], TABLE).tolist() == [[16, 10, 0], [4, 1, 1]]
    assert stack([np.zeros((2, 3)), np.ones((2, 3))], PICTURE).shape == (2, 2, 3)
    mixed = InputSchema((COLOUR, *PICTURE.fields))
    assert stack([("black", np.zeros((2, 3)))], mixed).tolist() == [[1, 0, 0, 0, 0, 0, 0]]
    with pytest.raises(InputError, match="preprocess"):
        stack(["hello"], InputSchema((Field("note", "text"),)))


@pytest.mark.parametrize(
    "schema",
    [
        TABLE,
        PICTURE,
        InputSchema((COLOUR, Field("note", "text"))),
        InputSchema((Field("x", "float", high=-2),)),
    ],
)
def test_the_probe_is_a_legal_item(schema: InputSchema) -> None:
    schema.check(probe_item(schema))


def test_one_item_is_not_a_batch() -> None:
    with pytest.raises(InputError, match="put it in a list"):
        checked_items({"total": 16}, TABLE)
    with pytest.raises(InputError, match="row 0: expected 3 values"):
        checked_items((16, 10, False), TABLE)
