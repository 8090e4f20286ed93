"""The atomic writer: shards laid out first, each tensor written once at its place, the folder renamed last.

A journal in the partial folder, keyed by recipe and inputs, lets a killed run continue: what it lists is hashed
again before use.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_fusion.checkpoint.formats import TensorSpec, build_header
from model_fusion.checkpoint.output_folder import OutputFolder, explain, pwrite
from model_fusion.errors import InputError

_BLOCK = 1 << 22
_SPAN, _SPANS = 1 << 24, 8
"""Bytes pushed to the disk at once, and how many such spans stay in memory behind them."""


def as_bytes(tensor: Tensor) -> memoryview:
    """The contiguous tensor's bytes, without a copy."""
    array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array).cast("B")


class CheckpointWriter(OutputFolder):
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
        super().__init__(target)
        self.done: dict[str, str] = {}
        self.inputs_of: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()
        self._pushed: deque[tuple[int, int, int]] = deque()
        self._shards = _plan_shards(specs, shard_size)
        self._place: dict[str, tuple[int, int, TensorSpec]] = {}
        self._headers: list[tuple[bytes, int]] = []
        for number, shard in enumerate(self._shards):
            header, offsets = build_header(shard)
            self._headers.append((header, len(header) + sum(spec.nbytes for spec in shard)))
            for spec, offset in zip(shard, offsets, strict=True):
                self._place[spec.name] = (number, offset, spec)
        layout = hashlib.sha256(b"".join(header for header, _ in self._headers)).hexdigest()
        try:
            self._start(f"{key}-{layout}", resume)
        except OSError as error:
            self.close()
            shutil.rmtree(self.partial, ignore_errors=True)
            raise explain(error, self.target) from error

    def _names(self) -> list[str]:
        total = len(self._shards)
        if total == 1:
            return ["model.safetensors"]
        return [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]

    def _start(self, key: str, resume: bool) -> None:
        lines = self.open().split(b"\n")[:-1]
        same = resume and bool(lines) and _parse(lines[0]).get("key") == key
        if not same:
            self.empty()
        for name, (header, size) in zip(self._names(), self._headers, strict=True):
            shard = self.partial / f"{name}.partial"
            if (self.partial / name).exists():
                os.rename(self.partial / name, shard)
            file = os.open(shard, os.O_RDWR | os.O_CREAT, 0o644)
            self._files.append(file)
            os.posix_fallocate(file, 0, size)  # a full disk is found here, before any work
            pwrite(file, memoryview(header), 0)
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
        written = pushed = 0
        for part in parts:
            data = as_bytes(part)
            if part.dtype != spec.dtype or written + len(data) > spec.nbytes:
                raise InputError(f"tensor {name!r}: planned {spec.shape} {spec.dtype}, got more, or {part.dtype}")
            digest.update(data)
            try:
                pwrite(self._files[number], data, offset + written)
            except OSError as error:
                raise explain(error, self.target) from error
            written += len(data)
            if written - pushed >= _SPAN:
                self._push(self._files[number], offset + pushed, written - pushed)
                pushed = written
        if written - pushed >= _SPAN >> 4:
            self._push(self._files[number], offset + pushed, written - pushed)
        if written != spec.nbytes:
            raise InputError(f"tensor {name!r}: planned {spec.nbytes} bytes, got {written}")
        record = {"name": name, "sha256": digest.hexdigest(), "inputs": dict(inputs or {})}
        try:
            with self._lock:
                os.write(self._journal, json.dumps(record).encode() + b"\n")
                self.inputs_of[name] = dict(inputs or {})
                self.done[name] = digest.hexdigest()
        except OSError as error:
            raise explain(error, self.target) from error
        return digest.hexdigest()

    def _push(self, file: int, offset: int, size: int) -> None:
        """Have the kernel begin to write a span, and forget an older one, by now on the disk.

        So the final fsync finds little left, and an output of any size passes through the same few pages of memory:
        it pushes nothing else out of the page cache, and costs no fresh pages.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        with self._lock:
            self._pushed.append((file, offset, size))
            old = self._pushed.popleft() if len(self._pushed) > _SPANS else None
        with contextlib.suppress(OSError):  # advice: a file system may refuse it
            os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)
            if old is not None:
                os.posix_fadvise(*old, os.POSIX_FADV_DONTNEED)

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Add the small files, make all durable, and put the folder at the target."""
        absent = [name for name in self._place if name not in self.done]
        if absent:
            raise InputError(f"tensor {absent[0]!r} was planned and never written")
        try:
            extra = dict(files)
            if len(self._shards) > 1:
                extra["model.safetensors.index.json"] = self._index()
            self.publish(self._names(), extra, last="config.json")
        except OSError as error:
            raise explain(error, self.target) from error
        self.close()

    def _index(self) -> bytes:
        shards = list(zip(self._names(), self._shards, strict=True))
        table = {spec.name: name for name, shard in shards for spec in shard}
        size = sum(spec.nbytes for shard in self._shards for spec in shard)
        index = {"metadata": {"total_size": size}, "weight_map": table}
        return json.dumps(index, indent=2).encode() + b"\n"


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


def _digest(file: int, offset: int, size: int) -> str:
    digest = hashlib.sha256()
    while size:
        block = os.pread(file, min(size, _BLOCK), offset)
        if not block:
            break
        digest.update(block)
        offset, size = offset + len(block), size - len(block)
    return digest.hexdigest()
