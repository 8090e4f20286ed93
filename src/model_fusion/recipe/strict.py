"""Reading a recipe strictly: YAML in, a pydantic model out, every mistake one line that names what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from model_fusion.errors import InputError
from model_fusion.recipe.merge import nearest


class Strict(BaseModel):
    """A part of a recipe. An unknown key is an error that names the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {str(key)!r}; {nearest(str(key), cls.model_fields)}")
        return data


Kind = TypeVar("Kind", bound=Strict)


def read_yaml(path: Path) -> Any:
    """The one YAML document of a file. Raises InputError."""
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise InputError(f"no such recipe: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        raise InputError(f"{path}{line}: not valid YAML") from error
    if len(documents) != 1:
        raise InputError(f"{path}: expected one YAML document, found {len(documents)}; write one recipe a file")
    return documents[0]


def validated(kind: type[Kind], data: Any, where: str) -> Kind:
    """`data` as a recipe of `kind`. Raises InputError with the first mistake and its place."""
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected keys such as {', '.join(list(kind.model_fields)[:3])}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{where}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from error
