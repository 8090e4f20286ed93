"""A fused model on disk: `fusion_config.json`, the bridge, the experts; the base LLM only by reference and hash.

fusion_config.json     what was fused, and the SHA-256 of every other file
bridge.safetensors     bridge and normalisers
adapter/               peft's own files, where the bridge is LoRA
experts/<name>/        each expert's own files
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model_fusion.checkpoint.llm import load_llm, resolve_llm
from model_fusion.errors import InputError, IntegrityError
from model_fusion.fuse.bridges import bridge_config
from model_fusion.fuse.experts import Expert, load_expert, save_expert
from model_fusion.fuse.experts.registry import file_sha256
from model_fusion.fuse.model import GIVEN, FusedModel

FORMAT = 1
CONFIG = "fusion_config.json"
WEIGHTS = "bridge.safetensors"


def save_fused(fused: FusedModel, folder: str | Path) -> None:
    """Write the active bridge, its normalisers and the experts. Complete or not at all: an interrupt or a full
    disk leaves what was there before. Raises InputError where `folder` holds something else."""
    with replaced(Path(folder)) as work:
        experts = {name: save_expert(expert, work / "experts" / name) for name, expert in fused.experts.items()}
        state = {key: value.detach().cpu().contiguous() for key, value in fused.fusion.state_dict().items()}
        save_file(state, work / WEIGHTS, metadata={"format": "pt"})
        extra = fused.bridge.save_extra(fused.base, fused.active, work)
        config = {
            "format": FORMAT,
            "base": {
                "name": fused.source.name,
                "hash": fused.source.hash,
                "fingerprint": fingerprint(fused.base),
                "fingerprint_bfloat16": fingerprint(fused.base, torch.bfloat16),
                "dtype": str(fused.base.dtype).removeprefix("torch."),
            },
            "bridge": fused.fusion.config.to_json(),
            "reserved_ids": fused.reserved,
            "experts": experts,
            "task": fused.task,
            "sha256": {name: file_sha256(work / name) for name in (WEIGHTS, *extra)},
        }
        (work / CONFIG).write_text(json.dumps({**config, "self": _digest(config)}, indent=2) + "\n")


def load_fused(
    folder: str | Path,
    *,
    base: Any = None,
    tokenizer: Any = None,
    given: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> FusedModel:
    """Rebuild what `save_fused` wrote.

    base: a name, folder or loaded model (then with `tokenizer`) to use in place of the recorded reference; its
    weights must be the ones the bridge was trained on. given: for each expert that could not be written whole, its
    live part (a callable, a torch module, or `Given`). Raises InputError for what is missing, IntegrityError for
    what does not match its hash.
    """
    folder = Path(folder)
    config = read_config(folder)
    for name in given or {}:
        if name not in config["experts"]:
            raise InputError(f"given names {name!r}, but the experts here are {', '.join(config['experts'])}")
    check_files(folder, config)
    experts = {name: _expert(folder, name, c, given, allow_pickle) for name, c in config["experts"].items()}
    recorded = config["base"]
    if base is None and recorded["name"] == GIVEN:
        raise InputError(
            "this fusion was made on an LLM handed in from Python: hand it in again, "
            "from_pretrained(folder, base=model, tokenizer=…), or name where it lies with base="
        )
    if base is None or isinstance(base, (str, Path)):
        source = resolve_llm(recorded["name"] if base is None else base, expected_hash=recorded["hash"])
        base, tokenizer = load_llm(source, dtype=dtype or getattr(torch, recorded["dtype"]), **options)
    else:
        if tokenizer is None:
            raise InputError("a loaded base model needs its tokenizer: from_pretrained(folder, base=…, tokenizer=…)")
        source = resolve_given(recorded)
    if not _same_base(base, recorded):
        raise IntegrityError(
            f"the base LLM {recorded['name']!r} has changed since this bridge was trained: "
            "retrain the bridge, or hand in the original base"
        )
    fused = FusedModel(base, tokenizer, experts, source, reserved=config["reserved_ids"])
    fused.task = config.get("task")
    load_bridge(fused, "default", folder, config)
    fused.eval()
    return fused


def load_bridge(fused: FusedModel, name: str, folder: str | Path, config: dict[str, Any] | None = None) -> None:
    """Add the bridge saved in `folder` to a model as `name`, and switch to it."""
    folder = Path(folder)
    config = config or read_config(folder)
    if config["reserved_ids"] != fused.reserved:
        raise InputError(f"{folder}: this bridge was trained for the experts {', '.join(config['reserved_ids'])}")
    check_files(folder, config)
    fused.add_bridge(name, bridge_config(config["bridge"]))
    state, own = load_file(folder / WEIGHTS), fused.fusion.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        raise IntegrityError(f"{folder / WEIGHTS}: does not fit these experts and this base LLM")
    fused.fusion.load_state_dict(state)
    fused.bridge.load_extra(fused.base, name, folder)


def check_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise IntegrityError for a file of the bridge that is missing or is not the one that was saved."""
    for file, digest in config["sha256"].items():
        if not (folder / file).is_file():
            raise IntegrityError(f"{folder / file} is missing: copy it back, or fuse again")
        if file_sha256(folder / file) != digest:
            raise IntegrityError(f"{folder / file} is not the file that was saved: its SHA-256 differs")


def read_config(folder: Path) -> dict[str, Any]:
    """The checked `fusion_config.json` of a saved fusion."""
    file = folder / CONFIG
    if not file.is_file():
        raise InputError(f"{folder}: no {CONFIG} here; expected the output of `model-fusion fuse` or `save_pretrained`")
    try:
        config: dict[str, Any] = json.loads(file.read_text())
        digest = config.pop("self")
    except (json.JSONDecodeError, KeyError, AttributeError, UnicodeDecodeError):
        raise IntegrityError(f"{file}: damaged; save the fusion again") from None
    if digest != _digest(config):
        raise IntegrityError(f"{file}: was changed after it was saved")
    if config["format"] != FORMAT:
        raise InputError(
            f"{file}: format {config['format']}, but this version reads format {FORMAT}: upgrade model-fusion"
        )
    return config


def _same_base(base: Any, recorded: Mapping[str, Any]) -> bool:
    """Is `base` the LLM that was trained on, in whatever dtype? Quantised weights have bytes of their own, and
    float16's are no other dtype's: then only the source's hash tells, which was checked before."""
    dtype = str(base.dtype).removeprefix("torch.")
    if dtype == recorded["dtype"] and not quantised(base):
        return fingerprint(base) == str(recorded["fingerprint"])
    coarse = recorded.get("fingerprint_bfloat16")  # (older fusions have none)
    if coarse is None or quantised(base) or "float16" in (dtype, recorded["dtype"]):
        return True
    return fingerprint(base, torch.bfloat16) == str(coarse)


def quantised(base: Any) -> bool:
    """Did transformers load this LLM with quantised weights?"""
    return getattr(base, "hf_quantizer", None) is not None or bool(getattr(base, "is_quantized", False))


def fingerprint(base: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names, shapes and up to 4,096 evenly spread elements of each of the LLM's own tensors, adapters
    left out: cheap, and any further training of the base changes it. `dtype`: rounded to it first."""
    digest = hashlib.sha256()
    tensors = {
        key.replace(".base_layer.", "."): value for key, value in base.state_dict().items() if "lora_" not in key
    }
    for key in sorted(tensors):
        flat = tensors[key].detach().reshape(-1)
        taken = flat[:: max(1, len(flat) // 4096)].contiguous().cpu()
        taken = taken.to(dtype) if dtype is not None and taken.is_floating_point() else taken
        digest.update(f"{key}{list(tensors[key].shape)}{taken.dtype}".encode())
        digest.update(taken.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resolve_given(recorded: Mapping[str, Any]) -> Any:
    """The recorded source of a base that the caller hands in loaded; its weights are checked by fingerprint."""
    from model_fusion.checkpoint.llm import LLMSource

    return LLMSource(recorded["name"], recorded["name"], recorded["hash"])


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block completes."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise InputError(f"{target}: exists and holds something else than a fusion; name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.incomplete-"))
    old = work.with_name(work.name.replace(".incomplete-", ".old-"))
    try:
        yield work
        for file in work.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors leaves its files to the owner alone
            _sync(file)
        if target.exists():
            target.rename(old)
        try:
            work.chmod(0o755)
            work.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _expert(
    folder: Path, name: str, config: Mapping[str, Any], given: Mapping[str, Any] | None, allow_pickle: bool
) -> Expert:
    try:
        return load_expert(folder / "experts" / name, config, given=(given or {}).get(name), allow_pickle=allow_pickle)
    except InputError as error:
        hint = "" if name in (given or {}) else f"; in Python: FusedModel.from_pretrained(…, given={{{name!r}: …}})"
        raise InputError(f"expert {name!r}: {error}{hint}") from None


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
