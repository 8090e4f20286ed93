"""Kind → class, and the hashes of what was saved. No class named in a config is ever imported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_fusion.errors import InputError, IntegrityError
from model_fusion.fuse.experts.base import Expert

KINDS = ("torch", "sklearn", "onnx", "callable")
_BLOCK = 1 << 20


def expert_class(kind: Any) -> type[Expert]:
    """The class of a registered kind; each is imported only when used. InputError for other names."""
    if kind == "torch":
        from model_fusion.fuse.experts.torch_module import TorchExpert

        return TorchExpert
    if kind == "sklearn":
        from model_fusion.fuse.experts.sklearn_estimator import SklearnExpert

        return SklearnExpert
    if kind == "onnx":
        from model_fusion.fuse.experts.onnx_graph import OnnxExpert

        return OnnxExpert
    if kind == "callable":
        from model_fusion.fuse.experts.callable_expert import CallableExpert

        return CallableExpert
    raise InputError(f"expert kind: expected one of {', '.join(KINDS)}, got {kind!r}")


def save_expert(expert: Expert, folder: Path | str) -> dict[str, Any]:
    """Write the expert's files into `folder`; return its JSON config with the SHA-256 of each of them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = expert.save(folder)
    return {**config, "sha256": {name: file_sha256(folder / name) for name in config.pop("files")}}


def load_expert(
    folder: Path | str, config: Mapping[str, Any], *, given: Any = None, allow_pickle: bool = False
) -> Expert:
    """Rebuild what `save_expert` wrote, after checking every file's hash.

    Raises IntegrityError naming the file that is missing or differs, InputError where `given` lacks a live
    part.
    """
    folder = Path(folder)
    kind = expert_class(config.get("kind"))
    hashes = config.get("sha256")
    if not isinstance(hashes, Mapping) or (config.get("saved", True) and not hashes):
        raise IntegrityError("the expert's saved config carries no SHA-256 of its files")
    for name, expected in hashes.items():
        if Path(name).name != name or name in ("", ".", ".."):
            raise IntegrityError(f"the expert's saved config names a file outside its folder: {name!r}")
        if not (folder / name).is_file():
            raise IntegrityError(f"{folder / name} is missing")
        if file_sha256(folder / name) != expected:
            raise IntegrityError(f"{folder / name} is not the file that was saved: its SHA-256 differs")
    try:
        return kind.load(folder, {**config, "files": list(hashes)}, given=given, allow_pickle=allow_pickle)
    except KeyError as error:
        raise IntegrityError(f"the expert's saved config lacks {error}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as hex, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
