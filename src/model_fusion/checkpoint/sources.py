"""Where a model's files are: a local folder, a hub id with a revision, `base+lora`, a GGUF file, a state dict in one
file, or an embedded model of an installed package.

Knows nothing about tensors. Hub access is imported only when a hub id is really asked for; a GGUF file is turned into
plain safetensors once, in a local cache.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from model_fusion.checkpoint.llm import EMBEDDED, resolve_llm
from model_fusion.errors import InputError, MissingDependencyError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_STATE_DICTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_HUB_FILES = [
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.spm", "*.tiktoken", "*.bpe", "*.codes",
    "README.md",
]  # fmt: skip
_HUB_PICKLES = ["pytorch_model*.bin", "adapter_model.bin"]
_HUB_NOT = ["*/*", "consolidated*"]  # other formats of the same weights


@dataclass(frozen=True)
class Source:
    """One resolved input: its text in the recipe, its folder, and the folder of a LoRA adapter on top. `file` is set
    where the model is a bare state dict: the one file of the folder that counts."""

    spec: str
    folder: Path
    adapter: Path | None = None
    file: Path | None = None

    @property
    def places(self) -> list[Path]:
        """Files and folders that the model is read from."""
        return [self.file or self.folder, *([self.adapter] if self.adapter else [])]


def resolve(spec: str, relative_to: Path | None = None, *, offline: bool = False) -> Source:
    """Find the folder(s) a recipe's model text means. `offline` takes from the hub only what is already here.

    Raises `InputError` for a path without a folder, and for a hub id that cannot be fetched.
    """
    whole = _local(spec, relative_to)
    if whole is not None:
        return Source(spec, whole.parent, file=whole) if whole.suffix in _STATE_DICTS else Source(spec, whole)
    base, plus, adapter = spec.partition("+")
    if plus and base and adapter:
        return Source(spec, _folder(base, relative_to, offline), _folder(adapter, relative_to, offline))
    return Source(spec, _folder(spec, relative_to, offline))


def _local(text: str, relative_to: Path | None) -> Path | None:
    """A local folder, or the file of a bare state dict; a GGUF file's or an embedded model's folder in the cache."""
    path = Path(text).expanduser()
    candidates = [path] if relative_to is None or path.is_absolute() else [path, relative_to / path]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate.resolve()
        if candidate.is_file():
            if candidate.suffix == ".gguf":
                return Path(resolve_llm(candidate).path)
            if candidate.suffix in _STATE_DICTS:
                return candidate.resolve()
            kinds = ", ".join((*_STATE_DICTS, ".gguf"))
            raise InputError(f"{text!r} is a file; give the folder that holds config.json and the weights, or {kinds}")
    if text in EMBEDDED:
        found = resolve_llm(text)
        return Path(found.path) if found.hash else None
    return None


def _folder(text: str, relative_to: Path | None, offline: bool) -> Path:
    found = _local(text, relative_to)
    if found is not None and found.is_file():
        raise InputError(f"{text!r} is a bare state dict; an adapter goes on a folder with a config.json")
    if found is not None:
        return found
    text = EMBEDDED[text][2] if text in EMBEDDED else text  # its package is not installed: the hub has it too
    name, _, revision = text.partition("@")
    if "huggingface.co/" in text:
        raise InputError(f"no such folder: {text!r}; for a model of the hub give owner/name, or owner/name@revision")
    looks_like_path = text.startswith((".", "/", "~", "\\")) or text.count("/") > 1 or os.sep + os.sep in text
    if looks_like_path or "/" not in name or not _HUB_ID.fullmatch(name):
        raise InputError(f"no such folder: {text!r} (neither a local folder nor an owner/name hub id)")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        message = f"no such folder: {text!r}; to fetch it as a hub id, install model-fusion[fuse]"
        raise MissingDependencyError(message) from error

    def fetch(files: list[str]) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=files,
                ignore_patterns=_HUB_NOT,
                local_files_only=offline,
            )
        )

    try:
        folder = fetch(_HUB_FILES)
        return folder if any(folder.glob("*.safetensors")) else fetch([*_HUB_FILES, *_HUB_PICKLES])
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"no such folder: {text!r}, and the hub did not give it either ({first})") from error
