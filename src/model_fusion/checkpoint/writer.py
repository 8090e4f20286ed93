"""The atomic writer: shards laid out first, each tensor written once at its place, the folder renamed last.

Until `finish`, everything lives in `.NAME.partial` beside the target, in files no loader looks for. A journal
there, keyed by recipe and inputs, lets a killed run continue: what it lists is hashed again before use.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_fusion.checkpoint.formats import TensorSpec, build_header
from model_fusion.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BLOCK = 1 << 22


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
    if not target.parent.is_dir():
        raise InputError(f"no such folder: {target.parent} (the output's parent)")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write in {target.parent}: permission denied")


def as_bytes(tensor: Tensor) -> memoryview:
    """The contiguous tensor's bytes, without a copy."""
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array).cast("B")


class CheckpointWriter:
    """Writes `specs` into `target`. Use as a context manager: an error removes the partial folder, an
    interruption (Ctrl-C, kill) keeps it for `resume=True`; neither leaves anything at `target`.

    `done` maps the names already safe on disk (from a resumed journal) to their SHA-256.
    """

    def __init__(
        self,
        target: Path,
        specs: Sequence[TensorSpec],
        *,
        key: str,
        shard_size: int = 5 * 10**9,
        resume: bool = False,
    ) -> None:
        self.target = Path(os.path.abspath(target))
        self.partial = self.target.with_name(f".{self.target.name}.partial")
        self._old = self.target.with_name(f".{self.target.name}.old")
        self.done: dict[str, str] = {}
        self.inputs_of: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()
        self._shards = _plan_shards(specs, shard_size)
        self._place: dict[str, tuple[int, int, TensorSpec]] = {}
        self._headers: list[tuple[bytes, int]] = []
        for number, shard in enumerate(self._shards):
            header, offsets = build_header(shard)
            self._headers.append((header, len(header) + sum(spec.nbytes for spec in shard)))
            for spec, offset in zip(shard, offsets, strict=True):
                self._place[spec.name] = (number, offset, spec)
        self._files: list[int] = []
        self._journal = -1
        layout = hashlib.sha256(b"".join(header for header, _ in self._headers)).hexdigest()
        try:
            self._start(f"{key}-{layout}", resume)
        except OSError as error:
            self.close()
            shutil.rmtree(self.partial, ignore_errors=True)
            raise _explain(error, self.target) from error

    def _names(self) -> list[str]:
        total = len(self._shards)
        if total == 1:
            return ["model.safetensors"]
        return [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]

    def _start(self, key: str, resume: bool) -> None:
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
        lines = (self.partial / "journal").read_bytes().split(b"\n")[:-1]
        same = resume and bool(lines) and _parse(lines[0]).get("key") == key
        if not same:
            for item in self.partial.iterdir():
                if item.name != "journal":
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
            os.ftruncate(self._journal, 0)
        for name, (header, size) in zip(self._names(), self._headers, strict=True):
            shard = self.partial / f"{name}.partial"
            if (self.partial / name).exists():
                os.rename(self.partial / name, shard)
            file = os.open(shard, os.O_RDWR | os.O_CREAT, 0o644)
            self._files.append(file)
            os.posix_fallocate(file, 0, size)  # a full disk is found here, before any work
            _pwrite(file, memoryview(header), 0)
        if same:
            self._recover(lines[1:])
        else:
            os.write(self._journal, json.dumps({"key": key}).encode() + b"\n")

    def _recover(self, lines: list[bytes]) -> None:
        for line in lines:
            record = _parse(line)
            name, digest = record.get("name", ""), record.get("sha256", "")
            if name not in self._place:
                continue
            number, offset, spec = self._place[name]
            if _digest(self._files[number], offset, spec.nbytes) == digest:
                self.done[name] = digest
                self.inputs_of[name] = record.get("inputs", {})

    def write(self, name: str, tensor: Tensor, inputs: Mapping[str, str] | None = None) -> str:
        """Write one tensor at its planned place; returns its SHA-256. Safe from several threads.

        `inputs` (input → SHA-256) is kept in `inputs_of`, and in the journal for a resumed run.
        """
        spec = self._place[name][2]
        if tuple(tensor.shape) != spec.shape:
            raise InputError(f"tensor {name!r}: planned {spec.shape} {spec.dtype}, got {tuple(tensor.shape)}")
        return self.write_parts(name, torch.split(tensor.contiguous().reshape(-1), _BLOCK), inputs)

    def write_parts(self, name: str, parts: Iterable[Tensor], inputs: Mapping[str, str] | None = None) -> str:
        """As `write`, from the flat tensor's consecutive parts; each is written before the next is asked for."""
        number, offset, spec = self._place[name]
        digest = hashlib.sha256()
        written = 0
        for part in parts:
            data = as_bytes(part)
            if part.dtype != spec.dtype or written + len(data) > spec.nbytes:
                raise InputError(f"tensor {name!r}: planned {spec.shape} {spec.dtype}, got more, or {part.dtype}")
            digest.update(data)
            try:
                _pwrite(self._files[number], data, offset + written)
            except OSError as error:
                raise _explain(error, self.target) from error
            written += len(data)
        if written != spec.nbytes:
            raise InputError(f"tensor {name!r}: planned {spec.nbytes} bytes, got {written}")
        record = {"name": name, "sha256": digest.hexdigest(), "inputs": dict(inputs or {})}
        try:
            _start_writeback(self._files[number], offset, written)
            with self._lock:
                os.write(self._journal, json.dumps(record).encode() + b"\n")
                self.inputs_of[name] = dict(inputs or {})
                self.done[name] = digest.hexdigest()
        except OSError as error:
            raise _explain(error, self.target) from error
        return digest.hexdigest()

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Add the small files, make all durable, and put the folder at the target."""
        absent = [name for name in self._place if name not in self.done]
        if absent:
            raise InputError(f"tensor {absent[0]!r} was planned and never written")
        try:
            names = self._names()
            extra = dict(files)
            if len(names) > 1:
                extra["model.safetensors.index.json"] = self._index()
            for file in self._files:
                os.fsync(file)
                os.close(file)
            self._files = []
            for name in names:
                os.rename(self.partial / f"{name}.partial", self.partial / name)
            # config.json last: without it nothing loads the folder
            for name in sorted(extra, key=lambda n: n == "config.json"):
                with (self.partial / name).open("wb") as handle:
                    handle.write(extra[name])
                    handle.flush()
                    os.fsync(handle.fileno())
            _sync_folder(self.partial)
            (self.partial / "journal").unlink()
            self._replace()
        except OSError as error:
            raise _explain(error, self.target) from error
        self.close()

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
        _sync_folder(self.target.parent)
        if had_old:
            shutil.rmtree(self._old)

    def _index(self) -> bytes:
        shards = list(zip(self._names(), self._shards, strict=True))
        table = {spec.name: name for name, shard in shards for spec in shard}
        size = sum(spec.nbytes for shard in self._shards for spec in shard)
        index = {"metadata": {"total_size": size}, "weight_map": table}
        return json.dumps(index, indent=2).encode() + b"\n"

    def close(self) -> None:
        """Release the files; what is on disk stays."""
        for file in [*self._files, self._journal]:
            if file >= 0:
                os.close(file)
        self._files, self._journal = [], -1

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()
        if kind is not None and issubclass(kind, Exception):
            shutil.rmtree(self.partial, ignore_errors=True)


def _plan_shards(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    # widest dtype first inside a shard would reorder the model; 8-byte padding of the header is all alignment
    for spec in specs:
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _pwrite(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _start_writeback(file: int, offset: int, size: int) -> None:
    """Ask the kernel to begin writing what was just written, so that the final fsync finds little left."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)


def _digest(file: int, offset: int, size: int) -> str:
    digest = hashlib.sha256()
    while size:
        block = os.pread(file, min(size, _BLOCK), offset)
        if not block:
            break
        digest.update(block)
        offset, size = offset + len(block), size - len(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(error: OSError, target: Path) -> InputError:
    if error.errno in _FULL:
        return InputError(f"disk full while writing {target}: free space or choose another disk")
    return InputError(f"cannot write {target}: {error.strerror or error}")
