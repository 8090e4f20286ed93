"""Named merges that come before the one asked for: where they live meanwhile, and how lineage looks through them."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_fusion.checkpoint.lineage import NAME
from model_fusion.checkpoint.reader import Checkpoint, open_checkpoint
from model_fusion.checkpoint.sources import Source
from model_fusion.errors import InputError


@dataclass(frozen=True)
class Made:
    """A named merge that exists by now, and the models it was made from in the end."""

    checkpoint: Checkpoint
    parents: list[Checkpoint]


class Stages:
    """A hidden folder beside the target. An error removes it, an interruption keeps it for `resume`; so a stage that
    is whole, and whose key is the same, is not made again. One process uses it at a time."""

    def __init__(self, target: Path, *, resume: bool) -> None:
        self._target = Path(os.path.abspath(target))
        self.folder = self._target.with_name(f".{self._target.name}.stages")
        self._resume = resume
        self._lock = -1

    def __enter__(self) -> "Stages":
        self.folder.mkdir(exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise InputError(f"another process is writing {self._target}: wait for it to end") from error
        if not self._resume:
            for item in [item for item in self.folder.iterdir() if item.name != "lock"]:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None or issubclass(kind, Exception):
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def made(self, name: str, number: int, key: str, make: Callable[[Path], object]) -> Checkpoint:
        """The stage `name`, made by `make(folder)` unless it is there already."""
        folder, note = self.folder / f"{number}", self.folder / f"{number}.key"
        if not (folder.is_dir() and note.is_file() and note.read_text() == key):
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            note.write_text(key)
        return open_checkpoint(Source(name, folder))


def parents(checkpoints: Mapping[str, Checkpoint], made: Mapping[str, Made]) -> list[Checkpoint]:
    """The models that a merge is made from in the end, each once."""
    every = [p for name, c in checkpoints.items() for p in (made[name].parents if name in made else [c])]
    return list({parent.source.spec: parent for parent in every}.values())


def through(inputs: Mapping[str, Mapping[str, str]], stages: Mapping[str, Made]) -> dict[str, dict[str, str]]:
    """Inputs of each tensor with those that stages made replaced by what they were made from, by the stages' lineage.

    Keys are `model:tensor`, values SHA-256.
    """
    made: dict[str, dict[str, Any]] = {}
    for name, stage in stages.items():
        tensors = json.loads((stage.checkpoint.folder / NAME).read_bytes())["tensors"]
        made |= {f"{name}:{tensor}": entry["inputs"] for tensor, entry in tensors.items()}
    result: dict[str, dict[str, str]] = {}
    for tensor, keys in inputs.items():
        found: dict[str, str] = {}
        for key, digest in keys.items():
            found |= made.get(key, {key: digest})
        result[tensor] = found
    return result
