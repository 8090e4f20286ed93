"""Masks on disk: one safetensors file beside which only the base is needed. Loading runs no code.

unified/NAME   the shared task vector        bits/NAME   uint8 [tasks, ⌈n / 8⌉]        rescale   float32 [tasks]
Its metadata has the kind, the tasks, what is tied, and the SHA-256 of the base's tensors and of the file's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model_fusion.dynamic.masks import Masks, State
from model_fusion.errors import InputError, IntegrityError

FORMAT = "1"
UNIFIED, BITS, RESCALE = "unified/", "bits/", "rescale"


def save_masks(masks: Masks, base: State, file: str | Path) -> int:
    """Write the file, complete or not at all; returns its bytes. `base`: the state dict the masks were made from."""
    file = Path(file)
    tensors = {UNIFIED + name: t.contiguous() for name, t in masks.unified.items()}
    tensors |= {BITS + name: t.contiguous() for name, t in masks.bits.items()} | {RESCALE: masks.rescale}
    note = {
        "format": FORMAT,
        "kind": masks.kind,
        "tasks": json.dumps(masks.tasks),
        "tied": json.dumps(masks.tied),
        "base": digest(base),
    }
    note["content"] = _content(note, tensors)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        save_file(tensors, name, metadata=note)
        os.chmod(name, 0o644)
        with open(name, "rb") as written:
            os.fsync(written.fileno())
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)
    return file.stat().st_size


def load_masks(file: str | Path, base: State | None = None) -> Masks:
    """Read what `save_masks` wrote. base: if given, its hash must be the recorded one.

    Raises InputError where there is no such file, IntegrityError where it is damaged or belongs to another base."""
    file = Path(file)
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected what save_masks wrote")
    try:
        with safe_open(file, framework="pt") as opened:
            note: dict[str, Any] = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError:
        raise IntegrityError(f"{file}: damaged, or not a safetensors file; save the masks again") from None
    if note.get("format") != FORMAT:
        raise InputError(f"{file}: masks of format {note.get('format')!r}, this version reads {FORMAT}")
    if note.pop("content", None) != _content(note, tensors):
        raise IntegrityError(f"{file}: was changed after it was saved")
    if base is not None and note["base"] != digest(base):
        raise IntegrityError(f"{file}: these masks were made from another base")
    return Masks(
        note["kind"],
        tuple(json.loads(note["tasks"])),
        _under(tensors, UNIFIED),
        _under(tensors, BITS),
        tensors[RESCALE],
        json.loads(note["tied"]),
    )


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of every tensor."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _content(note: Mapping[str, str], tensors: State) -> str:
    return hashlib.sha256((json.dumps(note, sort_keys=True) + digest(tensors)).encode()).hexdigest()


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
