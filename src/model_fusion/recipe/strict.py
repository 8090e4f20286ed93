"""Reading a recipe strictly: YAML in, a pydantic model out, every mistake one line that names what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from model_fusion.errors import InputError
from model_fusion.recipe.reading import mistake, nearest, yaml_documents


class Strict(BaseModel):
    """A part of a recipe. An unknown key is an error that names the nearest valid one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in data:
                if key not in known:
                    raise ValueError(f"unknown key {str(key)!r}; {nearest(str(key), known)}")
        return data


Kind = TypeVar("Kind", bound=Strict)


def read_yaml(path: Path) -> Any:
    """The one YAML document of a file. Raises InputError."""
    documents = yaml_documents(path)
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
        raise mistake(error, where) from error
