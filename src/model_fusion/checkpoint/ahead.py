"""Hashes a recipe's local inputs while torch is being imported: that keeps one core busy, this uses another.

Imports no torch. What it does not get to, or cannot read, is hashed later as ever; it reports no errors, since the
merge reads the same recipe and the same headers right after it and says what is wrong with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LARGEST_HEADER = 100_000_000


class Ahead:
    """A thread that hashes tensors, largest first, until `stop`."""

    def __init__(self, recipe: Path) -> None:
        self._done: dict[tuple[Path, int, int], str] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(recipe,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the tensor in hand; from then on the other cores belong to the merge."""
        self._stopped.set()
        self._thread.join()

    def digest(self, file: Path, begin: int, end: int) -> str | None:
        """SHA-256 of the bytes [begin, end) of a file, where it is known by now."""
        return self._done.get((file.resolve(), begin, end)) if self._done else None

    def _run(self, recipe: Path) -> None:
        import yaml

        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, struct.error, RecursionError):
            documents = list(yaml.safe_load_all(recipe.read_text(encoding="utf-8")))
            folders = {(recipe.parent / name).resolve() for name in _models(documents)}
            files = [file.resolve() for folder in sorted(folders) for file in sorted(folder.glob("*.safetensors"))]
            spans = [(file, begin, end) for file in files for begin, end in _spans(file)]
            maps: dict[Path, memoryview] = {}
            for file, begin, end in sorted(spans, key=lambda span: span[1] - span[2]):
                if self._stopped.is_set():
                    return
                if file not in maps:
                    with file.open("rb") as handle:
                        maps[file] = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
                # one call a tensor: hashlib lets go of the interpreter's lock, which the importing thread holds
                self._done[file, begin, end] = hashlib.sha256(maps[file][begin:end]).hexdigest()


def _models(part: Any) -> Iterator[str]:
    """Every text that a recipe names as a model, at any depth."""
    if isinstance(part, list):
        for item in part:
            yield from _models(item)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key in ("model", "base_model", "path") and isinstance(value, str):
                yield value
            else:
                yield from _models(value)


def _spans(file: Path) -> list[tuple[int, int]]:
    """Where the tensors of a safetensors file lie; raises ValueError where its header is damaged."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = struct.unpack("<Q", handle.read(8))[0]
        if length > min(_LARGEST_HEADER, size - 8):
            raise ValueError("header longer than the file")
        header = json.loads(handle.read(length))
    try:
        offsets = [info["data_offsets"] for name, info in header.items() if name != "__metadata__"]
        spans = [(8 + length + int(begin), 8 + length + int(end)) for begin, end in offsets]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError("damaged header") from error
    return [(begin, end) for begin, end in spans if 0 <= begin < end <= size]
