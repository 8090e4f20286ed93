"""The two data sets of a search: validation, read as often as it takes, and test, opened once, after the study.

Before that a hash of the test set is taken, to refuse a test set that is the validation set, and files of text are
checked to be text; no model sees them, and nothing of them is kept. A file beside the study says that the test set is
about to be read, before it is: so a second reading cannot look like the first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from model_fusion.checkpoint.writer import as_bytes
from model_fusion.errors import InputError


def digests(data: Any, what: str) -> list[str]:
    """What identifies a data set: one SHA-256 a file, or one of the value; none for a function, or for a value that is
    not made of tensors, arrays, numbers, texts, lists and dicts.

    **Raises** InputError for a path that is no file.
    """
    if callable(data):
        return []
    files = as_files(data)
    if files is None:
        digest = hashlib.sha256()
        try:
            _update(digest, data)
        except TypeError:
            return []
        return [digest.hexdigest()]
    found = []
    for file in files:
        if not file.is_file():
            raise InputError(f"no such {what} file: {file}")
        found.append(hashlib.sha256(file.read_bytes()).hexdigest())
    return found


def _update(digest: Any, value: Any) -> None:
    """Into the digest: the content of a value, whatever objects hold it. Raises TypeError for other kinds."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}".encode() + as_bytes(value))
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"array {value.dtype} {value.shape}".encode() + value.tobytes())
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        digest.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, Mapping | Sequence):
        digest.update(f"{len(value)} of {'mapping' if isinstance(value, Mapping) else 'sequence'}".encode())
        for item in value.items() if isinstance(value, Mapping) else value:
            _update(digest, item)
    else:
        raise TypeError(type(value))


def as_files(data: Any) -> list[Path] | None:
    """The files that the data names, if it is a path or a list of paths."""
    items = [data] if isinstance(data, str | Path) else data
    if isinstance(items, Sequence) and items and all(isinstance(item, str | Path) for item in items):
        return [Path(item).expanduser() for item in items]
    return None


def check_apart(validation: Any, test: Any) -> tuple[list[str], list[str]]:
    """The digests of both. Raises InputError where they share a file, or are one value."""
    one, other = digests(validation, "validation"), digests(test, "test")
    if validation is test or set(one) & set(other):
        raise InputError(
            "validation and test share data: the test set must be one that the search never sees; give another file"
        )
    return one, other


class TestSet:
    """`data` stays shut until `read`. `note` is the file that keeps count."""

    __test__ = False  # no test case, whatever its name

    def __init__(self, data: Any, note: Path, earlier: int = 0) -> None:
        """`earlier`: how often this very set was read for studies that came before."""
        self._data, self._note = data, note
        self._state: dict[str, Any] = {"reads": earlier, "scores": None}
        if note.is_file():
            self._state = json.loads(note.read_text())

    @property
    def reads(self) -> int:
        """How often it was opened; more than 1 means that the scores are a re-read."""
        return int(self._state["reads"])

    @property
    def opened(self) -> bool:
        """Has this study begun to read it?"""
        return self._note.is_file()

    def read(self, measure: Callable[[Any], dict[str, float]]) -> dict[str, float]:
        """`measure` of the data. What an earlier call of the same study measured is given again, not measured again."""
        if self._state["scores"] is None:
            self._state["reads"] += 1
            self._keep()
            data = self._data() if callable(self._data) else self._data
            self._state["scores"] = measure(data)
            self._keep()
        return dict(self._state["scores"])

    def _keep(self) -> None:
        work = self._note.with_name(f".{self._note.name}")
        with work.open("w", encoding="utf-8") as out:
            out.write(json.dumps(self._state))
            out.flush()
            os.fsync(out.fileno())
        os.replace(work, self._note)
