"""A causal LM from tensors in memory or from any source a merge can read: the stock class, float32, in eval mode."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_fusion.checkpoint.llm import LLMSource, load_tokenizer
from model_fusion.checkpoint.reader import Checkpoint, open_checkpoint
from model_fusion.checkpoint.sources import resolve
from model_fusion.dynamic import MODEL_TYPE
from model_fusion.errors import InputError, MissingDependencyError


@dataclass(frozen=True)
class Kind:
    """What a language model is besides its weights: its config, its tokenizer (pads on the left), and how it generates
    unless told otherwise."""

    config: Any
    tokenizer: Any
    generation: dict[str, Any]


def kind_of(config: Mapping[str, Any], files: Mapping[str, bytes], name: str) -> Kind:
    """From config.json's content and the small files beside it. Raises InputError where they make no language
    model; the message begins with `name`."""
    try:
        from transformers import AutoConfig, AutoTokenizer
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(f"{name} needs {error.name}: pip install 'model-fusion[fuse]'") from None
    logging.disable_progress_bar()
    if not config.get("model_type"):
        raise InputError(f"{name}: no language model (its config.json names no model_type)")
    if config["model_type"] not in CONFIG_MAPPING:  # whose own message lists all it knows
        raise InputError(f"{name}: transformers knows no model of type {config['model_type']!r}")
    try:
        known = AutoConfig.for_model(**config)
        if type(known) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"transformers knows no causal LM of type {known.model_type}")
        with tempfile.TemporaryDirectory() as folder:
            for file, content in files.items():
                (Path(folder) / file).write_bytes(content)
            known.save_pretrained(folder)  # says which class the tokenizer has
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be run as a language model ({str(error).splitlines()[0]})") from None
    if tokenizer.pad_token_id is None:
        # padding is masked everywhere: any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "left"
    return Kind(known, tokenizer, json.loads(files.get("generation_config.json", b"{}")))


def running(kind: Kind, tensors: Mapping[str, Tensor], device: str = "cpu") -> Any:
    """The model with these weights, under their names in a checkpoint, on a device."""
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    one = MODEL_FOR_CAUSAL_LM_MAPPING[type(kind.config)]
    model = one.from_pretrained(None, config=kind.config, state_dict=dict(tensors), dtype=torch.float32)
    if kind.generation:
        model.generation_config = GenerationConfig(**kind.generation)
    return model.eval().to(device)


def load(spec: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, hub id, GGUF file or base+adapter. Raises InputError."""
    return of_checkpoint(open_checkpoint(resolve(str(spec))))


def is_twin(checkpoint: Checkpoint) -> bool:
    """Whether the folder holds a twin, whose experts are weighed anew for each prompt."""
    return checkpoint.config.get("model_type") == MODEL_TYPE


def of_checkpoint(checkpoint: Checkpoint, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of an open checkpoint, or of the twin in its folder."""
    if is_twin(checkpoint):
        from model_fusion.dynamic.saving import load_twin

        source = LLMSource(checkpoint.source.spec, str(checkpoint.folder), "")
        return load_twin(checkpoint.folder, dtype=torch.float32).to(device), load_tokenizer(source)[1]
    kind = kind_of(checkpoint.config, checkpoint.files(), checkpoint.source.spec)
    return running(kind, {name: checkpoint.read(name) for name in checkpoint.names}, device), kind.tokenizer
