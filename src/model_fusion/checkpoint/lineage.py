"""`model_fusion.json`: where a checkpoint came from, and the hashes that prove it. No times: runs repeat."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from model_fusion.checkpoint.reader import Checkpoint, read_json
from model_fusion.checkpoint.sources import Source
from model_fusion.checkpoint.writer import as_bytes
from model_fusion.errors import InputError, IntegrityError

NAME = "model_fusion.json"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("model-fusion")
    except PackageNotFoundError:
        return "source"


def build(
    kind: str,
    recipe: Mapping[str, Any],
    seed: int,
    parents: Sequence[Checkpoint],
    outputs: Mapping[str, str],
    inputs: Mapping[str, Mapping[str, str]],
    files: Mapping[str, bytes],
) -> bytes:
    """The lineage file: `outputs` maps tensor → SHA-256, `inputs` maps tensor → {parent:tensor → SHA-256}."""
    record = {
        "format": 1,
        "kind": kind,
        "recipe": dict(recipe),
        "seed": seed,
        "versions": {
            "model_fusion": _version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "parents": [{"model": parent.source.spec, "licence": licence_of(parent.folder)} for parent in parents],
        "tensors": {name: {"sha256": outputs[name], "inputs": dict(inputs.get(name, {}))} for name in sorted(outputs)},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }
    return json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n"


def licence_of(folder: Path) -> str | None:
    """The licence named in a model card's header, if any."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:40]
    found = next((line for line in lines if line.startswith("license:")), None)
    return found.partition(":")[2].strip() if found else None


def verify(folder: Path) -> int:
    """Recompute every recorded hash; returns the number of tensors.

    Raises `IntegrityError` naming what changed, `InputError` when the folder has no lineage.
    """
    if not (folder / NAME).is_file():
        raise InputError(f"{folder}: no {NAME}; only folders that model-fusion wrote can be verified")
    record = read_json(folder / NAME)
    tensors, files = record.get("tensors"), record.get("files")
    if not isinstance(tensors, dict) or not isinstance(files, dict):
        raise IntegrityError(f"{folder / NAME}: damaged (no list of tensors and files)")
    for name, digest in files.items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise IntegrityError(f"{file}: changed or missing since it was written")
    checkpoint = Checkpoint(Source(str(folder), folder))
    odd = sorted(set(tensors) ^ set(checkpoint.names))
    if odd:
        raise IntegrityError(f"{folder}: tensor {odd[0]!r} was {'removed' if odd[0] in tensors else 'added'}")
    for name, entry in tensors.items():
        if hashlib.sha256(as_bytes(checkpoint.read(name))).hexdigest() != entry.get("sha256"):
            raise IntegrityError(f"{checkpoint.file_of(name)}: tensor {name!r} changed since it was written")
    return len(tensors)


def amend(record: Mapping[str, Any], changed: Mapping[str, str], key: str, note: Mapping[str, Any]) -> bytes:
    """The lineage of a folder some of whose tensors were made anew (name → SHA-256); `note` is kept under `key`."""
    tensors = {name: dict(entry) for name, entry in record["tensors"].items()}
    for name, digest in changed.items():
        tensors[name]["sha256"] = digest
    return json.dumps({**record, "tensors": tensors, key: dict(note)}, indent=1, ensure_ascii=False).encode() + b"\n"
