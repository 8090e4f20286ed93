"""Recomputing the hashes that a lineage file records: of the output's tensors and files, and of the inputs still here.

Streams: every tensor is a view of its file, read once. The proof reaches as far as the lineage file itself; its own
SHA-256 is returned, to be compared with one that was published elsewhere.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_fusion.checkpoint.formats import NAMES
from model_fusion.checkpoint.lineage import NAME
from model_fusion.checkpoint.reader import Checkpoint, open_checkpoint, read_json
from model_fusion.checkpoint.sources import Source, resolve
from model_fusion.checkpoint.writer import as_bytes
from model_fusion.errors import InputError, IntegrityError, MissingDependencyError

# what a loader would read, and so what must not appear in a folder unrecorded
_LOADED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py", ".json", ".jinja", ".model")
_PART = re.compile(r"\+(lora_\w+|scale)$")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass
class Verified:
    """What was checked. `unread`: inputs that are not here any more."""

    tensors: int
    files: int
    lineage: str
    inputs: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def add(self, part: "Verified") -> None:
        """Count what was checked of a folder inside this one."""
        self.tensors, self.files = self.tensors + part.tensors, self.files + part.files
        self.inputs += [model for model in part.inputs if model not in self.inputs]
        self.unread += [model for model in part.unread if model not in self.unread]


def verify(
    folder: Path | str,
    *,
    models: Path | None = None,
    inputs: bool = True,
    threads: int = 0,
    step: Callable[[int], object] = lambda total: None,
) -> Verified:
    """Recompute every recorded hash.

    **Arguments**
    models: the folder that relative model names start from; without it, the current folder and the output's parent.
    inputs: whether to read the inputs too. `step` is called after each tensor with their number.

    **Raises** `IntegrityError` naming file and tensor of what changed; `InputError` where there is no lineage.
    """
    folder = Path(folder)
    places: list[Path | None] = [models] if models else [None, folder.resolve().parent]
    result, problems = _verify(folder, places, inputs, threads or torch.get_num_threads(), step)
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise IntegrityError("; ".join(problems[:5]) + more)
    return result


def _verify(
    folder: Path, places: list[Path | None], inputs: bool, threads: int, step: Callable[[int], object]
) -> tuple[Verified, list[str]]:
    """What was checked of a folder and the parts in it, and what is wrong. `places`: where inputs may be."""
    record, digest = read_lineage(folder)
    problems = _files(folder, record["files"])
    checkpoint = Checkpoint(Source(str(folder), folder))
    tensors: dict[str, Any] = record["tensors"]
    odd = sorted(set(tensors) ^ set(checkpoint.names))
    problems += [f"{folder}: tensor {name!r} was {'removed' if name in tensors else 'added'}" for name in odd]
    problems += _loose(folder, record["files"], {checkpoint.file_of(name).name for name in checkpoint.names})
    own = [name for name in tensors if name in checkpoint]
    wanted = _inputs(tensors, [parent["model"] for parent in record["parents"]]) if inputs else {}
    tick = partial(step, len(own) + sum(len(hashes) for hashes in wanted.values()))
    with ThreadPoolExecutor(threads) as pool:
        problems += _kept(pool.map(lambda name: _output(checkpoint, name, tensors[name], tick), own))
        result = Verified(len(tensors), len(record["files"]), digest)
        for model, hashes in wanted.items():
            parent = _find(model, places)
            if parent is None:
                result.unread.append(model)
                continue
            names = sorted({_name(label) for label in hashes})
            problems += _kept(pool.map(partial(_input, parent, hashes, tick), names))
            result.inputs.append(model)
    for name in record.get("parts", ()):
        if not isinstance(name, str) or Path(name).name != name:
            raise IntegrityError(f"{folder / NAME}: part {name!r} leads outside the folder")
        if not (folder / name).is_dir():
            problems.append(f"{folder / name}: removed since it was written")
            continue
        part, found = _verify(folder / name, places, inputs, threads, step)
        problems += found
        result.add(part)
    return result, problems


def read_lineage(folder: Path) -> tuple[dict[str, Any], str]:
    """The lineage record of a folder and the file's SHA-256."""
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    file = folder / NAME
    if not file.is_file():
        raise InputError(f"{folder}: no {NAME}; only folders that model-fusion wrote can be verified")
    record = read_json(file)
    parts = record.get("tensors"), record.get("files"), record.get("parents")
    tensors, files, parents = parts
    if not (
        isinstance(tensors, dict)
        and all(isinstance(entry, dict) and isinstance(entry.get("inputs"), dict) for entry in tensors.values())
        and isinstance(files, dict)
        and isinstance(parents, list)
        and all(isinstance(parent, dict) and isinstance(parent.get("model"), str) for parent in parents)
    ):
        raise IntegrityError(f"{file}: damaged (no list of tensors, files and parents)")
    return record, hashlib.sha256(file.read_bytes()).hexdigest()


def _files(folder: Path, files: Mapping[str, str]) -> list[str]:
    problems = []
    for name, digest in files.items():
        file = folder / name
        if Path(name).name != name:
            raise IntegrityError(f"{folder / NAME}: file {name!r} leads outside the folder")
        if not file.is_file():
            problems.append(f"{file}: removed since it was written")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            problems.append(f"{file}: changed since it was written")
    return problems


def _loose(folder: Path, files: Mapping[str, str], weights: set[str]) -> list[str]:
    known = {*files, *weights, NAME, *_INDEXES}
    loose = sorted(p.name for p in folder.iterdir() if p.suffix in _LOADED and p.name not in known)
    return [f"{folder / name}: added since the folder was written" for name in loose]


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def _output(checkpoint: Checkpoint, name: str, entry: Mapping[str, Any], step: Callable[[], object]) -> str | None:
    spec, where = checkpoint.spec(name), f"{checkpoint.file_of(name)}: tensor {name!r}"
    step()
    kind = NAMES[spec.dtype]
    if (kind, list(spec.shape)) != (entry.get("dtype"), entry.get("shape")):
        was = f"{entry.get('dtype')} {entry.get('shape')}"
        return f"{where} is {kind} {list(spec.shape)}, was written as {was}"
    return None if _hash(checkpoint.read(name)) == entry.get("sha256") else f"{where} changed since it was written"


def _name(label: str) -> str:
    """The tensor that a part of it (an adapter's matrix, an FP8 scale) belongs to."""
    return _PART.sub("", label)


def _input(parent: Checkpoint, hashes: Mapping[str, str], step: Callable[[], object], name: str) -> str | None:
    step()
    if name not in parent:
        return f"{parent.folder}: input tensor {name!r} is gone since it was read"
    parts = parent.stored(name)
    for label in [label for label in hashes if _name(label) == name]:
        if label not in parts or _hash(parts[label]) != hashes[label]:
            place = parent.source.adapter if parent.source.adapter and label != name else parent.file_of(name)
            return f"{place}: input tensor {label!r} changed since it was read"
    return None


def _inputs(tensors: Mapping[str, Any], models: list[str]) -> dict[str, dict[str, str]]:
    """Model → {tensor → SHA-256}; the longest model text that fits is the one meant (texts may hold colons)."""
    found: dict[str, dict[str, str]] = {model: {} for model in models}
    order = sorted(models, key=len, reverse=True)
    for entry in tensors.values():
        for key, digest in entry["inputs"].items():
            model = next((m for m in order if key.startswith(m + ":")), None)
            if model is None:
                raise IntegrityError(f"{NAME}: input {key!r} belongs to none of the parents")
            found[model][key.removeprefix(model + ":")] = digest
    return {model: hashes for model, hashes in found.items() if hashes}


def _find(model: str, places: Iterable[Path | None]) -> Checkpoint | None:
    for place in places:
        try:
            source = resolve(model, place, offline=True)
        except (InputError, MissingDependencyError):
            continue
        return open_checkpoint(source)
    return None


def _kept(found: Iterable[str | None]) -> list[str]:
    return [text for text in found if text is not None]
