"""Results as a JSON file that a user names."""

import json
from pathlib import Path
from typing import Any

from model_fusion.errors import InputError


def check(path: Path | None, flag: str = "--json") -> None:
    """Raises `InputError` where the file could not be written: to be called before long work."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise InputError(f"{flag} {path}: {'is a folder' if path.is_dir() else 'no such folder'}; name a file")


def write(path: Path, data: Any) -> None:
    """NaN and Inf are no JSON: a value that holds them is a fault of the caller (ValueError)."""
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
