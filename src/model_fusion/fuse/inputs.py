"""An expert's input as people write it: words (`16 10 no`) or JSON (`[16, 10, false]`), read by its schema."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from model_fusion.errors import InputError
from model_fusion.fuse.experts.schema import InputSchema
from model_fusion.recipe.reading import nearest


def parse_item(name: str, schema: InputSchema, text: str) -> Any:
    """One item from words or JSON. Raises InputError with the reason and the schema."""
    try:
        if text.lstrip().startswith(("[", "{")):
            try:
                return schema.check(json.loads(text))
            except json.JSONDecodeError as error:
                raise InputError(f"not valid JSON ({error.msg} at character {error.pos + 1})") from None
        if len(schema.fields) == 1 and schema.fields[0].type == "text":
            return schema.check(text)
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise InputError(f"{error}".lower()) from None
        return schema.parse(words)
    except InputError as error:
        raise InputError(f"expert {name!r}: {error}; its input is {schema}") from None


def check_item(name: str, schema: InputSchema, value: Any) -> Any:
    """One item from a JSON value; a string counts as words. Raises InputError with the reason and the schema."""
    if isinstance(value, str):
        return parse_item(name, schema, value)
    try:
        return schema.check(value)
    except InputError as error:
        raise InputError(f"expert {name!r}: {error}; its input is {schema}") from None


def known(name: str, schemas: Mapping[str, InputSchema]) -> InputSchema:
    """The schema of the expert called `name`. Raises InputError naming the nearest one."""
    if name not in schemas:
        raise InputError(f"unknown expert {name!r}; {nearest(name, schemas)}")
    return schemas[name]


def parse_pairs(pairs: list[str], schemas: Mapping[str, InputSchema]) -> dict[str, list[Any]]:
    """`NAME=VALUE` texts as items by expert; a name may come several times. Raises InputError."""
    found: dict[str, list[Any]] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise InputError(f"--input {pair!r}: write NAME=VALUE, such as {next(iter(schemas))}='…'")
        found.setdefault(name, []).append(parse_item(name, known(name, schemas), text))
    return found
