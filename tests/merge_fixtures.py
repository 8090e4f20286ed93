"""Tiny Llama-shaped checkpoints and a linear method, for tests of the merge engine."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model_fusion.checkpoint.statistics import Kind, Statistics

LAYERS, WIDTH, VOCABULARY = 4, 8, 16


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    made = {"model.embed_tokens.weight": new(VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        made[f"model.layers.{layer}.self_attn.q_proj.weight"] = new(WIDTH, WIDTH)
        made[f"model.layers.{layer}.mlp.up_proj.weight"] = new(2 * WIDTH, WIDTH)
        made[f"model.layers.{layer}.input_layernorm.weight"] = new(WIDTH)
    return {**made, "model.norm.weight": new(WIDTH), "lm_head.weight": new(VOCABULARY, WIDTH)}


def write(folder: Path, seed: int, *, state: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(seed) if state is None else state, folder / "model.safetensors", {"format": "pt"})
    full = {"model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": False}
    full |= {"torch_dtype": "float16", "layer_types": [f"kind{i}" for i in range(LAYERS)], **config}
    (folder / "config.json").write_text(json.dumps(full))
    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


def statistics(seed: int, kind: Kind) -> Statistics:
    """Made-up statistics of `tensors(seed)`: of its matrices alone, embedding and head left out."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in tensors(seed).items():
        if tensor.dim() == 2 and "layers" in name:
            x = torch.randn(tensor.shape if kind == "fisher" else (5, tensor.shape[1]), generator=generator)
            found[name] = x.square() if kind == "fisher" else x.T @ x / len(x)
    return Statistics(kind, found, 5)


def write_statistics(folder: Path, model: str, kind: Kind) -> str:
    """The file's name, beside the model's folder, whose name a, b, c … is its seed."""
    return statistics(ord(model) - ord("a"), kind).save(folder / f"{model}.{kind}.safetensors").name


@dataclass(frozen=True)
class NoParams:
    pass


@dataclass(frozen=True)
class Weight:
    weight: float = 1.0


def _linear(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[Weight],
    params: NoParams,
    key: object,
) -> Tensor:
    total = sum(p.weight for p in model_params)
    return sum((p.weight / total * m.float() for p, m in zip(model_params, models, strict=True)), torch.zeros(()))


@dataclass(frozen=True)
class PlainLinear:
    """A method of the registry's shape; `run` can be replaced to prove that a test notices."""

    name: str = "linear"
    sees: str = "elementwise"
    params: Any = NoParams
    model_params: Any = Weight
    needs_base: str = "optional"
    min_models: int = 1
    max_models: int | None = None
    equal_norms: bool = False
    needs_data: None = None
    run: Any = _linear

    def stream(self, *arguments: Any) -> Iterator[Tensor]:
        *given, dtype = arguments
        yield self.run(*given).to(dtype).reshape(-1)
