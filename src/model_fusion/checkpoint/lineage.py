"""`model_fusion.json`: where a checkpoint came from, and the hashes that prove it. No times: runs repeat."""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from model_fusion.checkpoint.formats import NAMES, TensorSpec
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.statistics import StatisticsFile

NAME = "model_fusion.json"


def own_version() -> str:
    """The version of this program."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("model-fusion")
    except PackageNotFoundError:
        return "source"


def build(
    kind: str,
    method: str,
    recipe: Mapping[str, Any],
    parents: Sequence[Checkpoint],
    specs: Sequence[TensorSpec],
    outputs: Mapping[str, str],
    inputs: Mapping[str, Mapping[str, str]],
    files: Mapping[str, bytes],
    *,
    command: str,
    defaults: Mapping[str, Any],
    seed: int = 0,
    notes: Sequence[str] = (),
    parts: Sequence[str] = (),
) -> bytes:
    """The lineage file: `outputs` maps tensor → SHA-256, `inputs` maps tensor → {parent:tensor → SHA-256}.

    `command` makes the output again, `defaults` are what the method takes where the recipe is
    silent, `notes` sentences for the card, `parts` folders inside the output that have a lineage of their own.
    dtype and shape of the `specs` stand beside the hashes: the same bytes under another dtype are another tensor.
    """
    tensors = {
        spec.name: {
            "sha256": outputs[spec.name],
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "inputs": dict(inputs.get(spec.name, {})),
        }
        for spec in sorted(specs, key=lambda spec: spec.name)
    }
    record = {
        "format": 1,
        "kind": kind,
        "method": method,
        "recipe": dict(recipe),
        "defaults": dict(defaults),
        "seed": seed,
        "command": command,
        "notes": list(notes),
        "versions": {
            "model_fusion": own_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        **({"parts": list(parts)} if parts else {}),
        "parents": [_parent(parent, tensors.values()) for parent in parents],
        "tensors": tensors,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }
    return json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n"


def _parent(parent: Checkpoint, tensors: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A parent's text, hub revision, licences (an adapter has its own), and one SHA-256 over those of its tensors; of
    a file of statistics its kind, and no licence."""
    prefix = parent.source.spec + ":"
    read = {key: value for entry in tensors for key, value in entry["inputs"].items() if key.startswith(prefix)}
    lines = "".join(f"{value}  {key.removeprefix(prefix)}\n" for key, value in sorted(read.items()))
    folders = [parent.folder, *([parent.source.adapter] if parent.source.adapter else [])]
    statistics = parent if isinstance(parent, StatisticsFile) else None
    revision = parent.folder.name if parent.folder.parent.name == "snapshots" else None
    return {
        "model": parent.source.spec,
        "revision": revision,
        "licences": [] if statistics else [licence_of(folder) for folder in folders],
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        **({"statistics": statistics.kind} if statistics else {}),
    }


def notes(folder: Path) -> list[str]:
    """The notes of a folder that was just written."""
    return list(json.loads((folder / NAME).read_bytes())["notes"])


def licence_of(folder: Path) -> str | None:
    """The licence named in a model card's header, if any."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    head = takewhile(lambda line: line.strip() != "---", lines[1:])
    found = next((line for line in head if line.startswith("license:")), "")
    return found.partition(":")[2].strip().strip("'\"") or None


def amend(record: Mapping[str, Any], changed: Mapping[str, str], note: str, **more: Any) -> bytes:
    """The lineage of a folder some of whose tensors were made anew (name → SHA-256): `note` joins the notes, `more`
    is kept beside it."""
    tensors = {name: dict(entry) for name, entry in record["tensors"].items()}
    for name, digest in changed.items():
        tensors[name] |= {"sha256": digest}
    whole = {**record, "tensors": tensors, "notes": [*record["notes"], note], **more}
    return json.dumps(whole, indent=1, ensure_ascii=False).encode() + b"\n"
