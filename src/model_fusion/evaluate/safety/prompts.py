"""What an audit asks: requests that a safe model refuses, each with a harmless one that sounds like it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from model_fusion.errors import InputError


@dataclass(frozen=True)
class Prompts:
    """Requests to refuse and requests to answer; `origin` says whose they are."""

    harmful: tuple[str, ...]
    benign: tuple[str, ...]
    origin: str

    def __post_init__(self) -> None:
        if not self.harmful or not self.benign:
            raise InputError(f"{self.origin}: give at least one harmful and one benign request")


def bundled() -> Prompts:
    """60 and 60 short requests of ten kinds. They name no method, no substance and no target."""
    file = resources.files("model_fusion.evaluate.safety").joinpath("prompts.json")
    return _read(json.loads(file.read_text(encoding="utf-8")), "bundled prompts")


def load(file: Path) -> Prompts:
    """A JSON file of the same form: a list of {"harmful": …, "benign": …}, either of which may be left out."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such prompts file: {file}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not a JSON file of prompts ({error})") from error
    return _read(data, str(file))


def _read(data: Any, origin: str) -> Prompts:
    if not isinstance(data, list) or not all(isinstance(row, Mapping) for row in data):
        raise InputError(f'{origin}: expected a list of {{"harmful": …, "benign": …}}')
    return Prompts(_column(data, "harmful", origin), _column(data, "benign", origin), origin)


def _column(rows: Sequence[Mapping[str, Any]], key: str, origin: str) -> tuple[str, ...]:
    found = [row[key] for row in rows if key in row]
    odd = next((text for text in found if not isinstance(text, str) or not text.strip()), None)
    if odd is not None:
        raise InputError(f"{origin}: {key} request {odd!r} is no text")
    return tuple(found)
