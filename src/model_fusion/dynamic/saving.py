"""A twin on disk.

shared/                 θ*, an ordinary checkpoint that stock transformers loads
exclusive.safetensors   the experts' parts: `NAME:up` [m, T·r] and `NAME:down` [T·r, n], or `NAME:down` [T, m]
router.safetensors      the router, float32
config.json             experts' names, how it was built, and the SHA-256 of every other file
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from model_fusion.checkpoint.llm import hash_files
from model_fusion.checkpoint.reader import read_json
from model_fusion.checkpoint.whole_folder import whole_folder
from model_fusion.dynamic import MODEL_TYPE
from model_fusion.dynamic.causal_lm import TwinConfig, TwinForCausalLM
from model_fusion.dynamic.parts import Part, Parts
from model_fusion.dynamic.router import Router
from model_fusion.errors import InputError, IntegrityError

SHARED, EXCLUSIVE, ROUTER, CONFIG = "shared", "exclusive.safetensors", "router.safetensors", "config.json"


def save_twin(twin: TwinForCausalLM, folder: Path) -> None:
    """Write the folder; one that holds a twin is replaced. Raises InputError."""
    old = folder / CONFIG
    known = old.is_file() and read_json(old).get("model_type") == MODEL_TYPE
    with whole_folder(folder, overwrite=known) as work:
        twin.shared.save_pretrained(work / SHARED)
        write_twin(work, twin)


def write_twin(work: Path, twin: TwinForCausalLM) -> None:
    """Everything but `shared/`, which lies in `work` already."""
    factors: dict[str, Tensor] = {}
    for name, part in twin.twin.parts.items():
        factors[f"{name}:down"] = part.down.detach().cpu().contiguous()
        if part.up is not None:
            factors[f"{name}:up"] = part.up.detach().cpu().contiguous()
    save_file(factors, work / EXCLUSIVE, metadata={"format": "pt"})
    if isinstance(twin.twin.router, Router):
        state = {key: value.detach().cpu().contiguous() for key, value in twin.twin.router.state_dict().items()}
        save_file(state, work / ROUTER, metadata={"format": "pt"})
    twin.generation_config.save_pretrained(work)
    files = sorted(path for path in work.rglob("*") if path.is_file() and path.name != "journal")
    digests = {str(path.relative_to(work)): hash_files([path]) for path in files}
    # a copy, since a config resets how attention is computed in every config it holds
    config = TwinConfig(copy.deepcopy(twin.shared.config), twin.config.experts, twin.config.built, digests)
    config.architectures = ["TwinForCausalLM"]
    config.save_pretrained(work)


def load_twin(folder: Path, *, dtype: Any = "auto", **options: Any) -> TwinForCausalLM:
    """The twin in `folder`, in eval mode; no code from files is run. Raises InputError for another folder,
    IntegrityError for a file that is not the one that was written."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if config.get("model_type") != MODEL_TYPE:
        raise InputError(f"{folder}: no twin here; expected the output of `model-fusion dynamic twin`")
    _check(folder, config.get("files", {}))
    logging.disable_progress_bar()
    shared = AutoModelForCausalLM.from_pretrained(folder / SHARED, dtype=dtype, trust_remote_code=False, **options)
    factors = load_file(folder / EXCLUSIVE)
    experts = config["experts"]
    try:
        parts = _parts(factors, shared.state_dict(), len(experts))
        router = None
        if (folder / ROUTER).is_file():
            state = load_file(folder / ROUTER)
            router = Router(state["layers.0.weight"].shape[1], len(experts)).eval()
            router.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise IntegrityError(f"{folder}: does not fit its shared model ({str(error).splitlines()[0]})") from None
    built = config.get("built")
    twin = TwinForCausalLM(shared, parts, router and router.requires_grad_(False), experts, built)
    twin.eval()
    return twin


def _check(folder: Path, files: Mapping[str, str]) -> None:
    if EXCLUSIVE not in files:
        raise IntegrityError(f"{folder / CONFIG}: damaged (no list of files); build the twin again")
    for name, digest in files.items():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise IntegrityError(f"{folder / CONFIG}: file {name!r} leads outside the folder")
        if not file.is_file():
            raise IntegrityError(f"{file} is missing: copy it back, or build the twin again")
        if hash_files([file]) != digest:
            raise IntegrityError(f"{file} is not the file that was written: its SHA-256 differs")


def _parts(factors: Mapping[str, Tensor], state: Mapping[str, Tensor], experts: int) -> Parts:
    found: Parts = {}
    for key, down in factors.items():
        name, _, side = key.rpartition(":")
        if side == "down":
            like = state[name]
            up = factors.get(f"{name}:up")
            if up is not None:
                up = up.to(like.dtype)
            found[name] = Part(tuple(like.shape), experts, down.to(like.dtype), up)
    return found
