"""An output folder that appears whole or not at all: written beside its target, renamed when complete.

Until `publish`, everything lives in `.NAME.partial` beside the target, in files no loader looks for.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from model_fusion.errors import InputError

_OURS = (".safetensors", ".json", ".bin", ".gguf")
"""What a folder that may be replaced holds some of."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(target: Path, inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse an output that is an input (or inside or around one), or that exists without `overwrite`."""
    real = target.resolve()
    for folder in inputs:
        source = folder.resolve()
        if real == source or real in source.parents or source in real.parents:
            raise InputError(f"output {target} is, holds or lies in the input {folder}: choose another folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"output {target} exists and is not a folder: choose another name")
    if target.exists() and not overwrite and any(target.iterdir()):
        raise InputError(f"output {target} already exists: pass --overwrite to replace it, or choose another folder")
    if target.exists() and any(target.iterdir()) and not any(p.suffix in _OURS for p in target.iterdir()):
        raise InputError(
            f"output {target} holds other things than a model, which --overwrite would delete: empty it first"
        )
    if not target.parent.is_dir():
        raise InputError(f"no such folder: {target.parent} (the output's parent)")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write in {target.parent}: permission denied")


class OutputFolder:
    """Use as a context manager: an error removes the partial folder, an interruption (Ctrl-C, kill) keeps it;
    neither leaves anything at `target`. One process writes at a time: the journal file is its lock."""

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.abspath(target))
        self.partial = self.target.with_name(f".{self.target.name}.partial")
        self._old = self.target.with_name(f".{self.target.name}.old")
        self._files: list[int] = []
        self._journal = -1

    def open(self) -> bytes:
        """Make or take over the partial folder; returns what its journal holds."""
        if self._old.is_dir() and not self.target.exists():
            os.rename(self._old, self.target)  # killed between the two renames: the user's old folder comes back
        self.partial.mkdir(exist_ok=True)
        self._journal = os.open(self.partial / "journal", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._journal)
            self._journal = -1
            raise InputError(f"another process is writing {self.target}: wait for it to end") from error
        return (self.partial / "journal").read_bytes()

    def empty(self) -> None:
        """Forget what an earlier run left."""
        for item in self.partial.iterdir():
            if item.name != "journal":
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        os.ftruncate(self._journal, 0)

    def publish(self, weights: Sequence[str], files: Mapping[str, bytes], last: str) -> None:
        """Sync the open weight files, drop their `.partial`, add the small files (`last`, without which nothing
        loads the folder, at the end), and put the folder at the target."""
        for file in self._files:
            os.fsync(file)
            os.close(file)
        self._files = []
        for name in weights:
            os.rename(self.partial / f"{name}.partial", self.partial / name)
        for name in sorted(files, key=lambda n: n == last):
            with (self.partial / name).open("wb") as handle:
                handle.write(files[name])
                handle.flush()
                os.fsync(handle.fileno())
        sync_folder(self.partial)
        (self.partial / "journal").unlink()
        self._replace()

    def _replace(self) -> None:
        if self._old.exists():
            shutil.rmtree(self._old)
        had_old = self.target.exists()
        if had_old:
            os.rename(self.target, self._old)
        try:
            os.rename(self.partial, self.target)
        except OSError:
            if had_old:
                os.rename(self._old, self.target)
            raise
        sync_folder(self.target.parent)
        if had_old:
            shutil.rmtree(self._old)

    def close(self) -> None:
        """Release the files; what is on disk stays."""
        for file in [*self._files, self._journal]:
            if file >= 0:
                os.close(file)
        self._files, self._journal = [], -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()
        if kind is not None and issubclass(kind, Exception):
            shutil.rmtree(self.partial, ignore_errors=True)


def pwrite(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explain(error: OSError, target: Path) -> InputError:
    if error.errno in _FULL:
        return InputError(f"disk full while writing {target}: free space or choose another disk")
    return InputError(f"cannot write {target}: {error.strerror or error}")
