"""Llama-, GPT-2- and Qwen-like bf16 checkpoints whose differences tie as heavily as real fine-tunes' do.

A fine-tune is its base plus Gaussian steps of about four bf16 spacings, rounded to bf16 again: a 16.8M-element
tensor then has some ten thousand distinct |difference|, most of them many times over, and many exact zeros.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SPREAD, STEP = 0.02, 5e-4
_SHARD = 2 * 10**9


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; `style` chooses names, biases and config: llama, qwen2 or gpt2."""

    vocabulary: int
    width: int
    inner: int
    layers: int
    style: str = "llama"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor's name and shape, in the order of the file."""
        v, w, inner = self.vocabulary, self.width, self.inner
        if self.style == "gpt2":
            yield from [("wte.weight", (v, w)), ("wpe.weight", (64, w))]
            for i in range(self.layers):
                at = f"h.{i}."
                for norm in ("ln_1", "ln_2"):
                    yield from [(f"{at}{norm}.weight", (w,)), (f"{at}{norm}.bias", (w,))]
                for name, a, b in [("attn.c_attn", w, 3 * w), ("attn.c_proj", w, w)]:
                    yield from [(f"{at}{name}.weight", (a, b)), (f"{at}{name}.bias", (b,))]
                for name, a, b in [("mlp.c_fc", w, inner), ("mlp.c_proj", inner, w)]:
                    yield from [(f"{at}{name}.weight", (a, b)), (f"{at}{name}.bias", (b,))]
            yield from [("ln_f.weight", (w,)), ("ln_f.bias", (w,))]
            return
        yield "model.embed_tokens.weight", (v, w)
        for i in range(self.layers):
            at = f"model.layers.{i}."
            yield f"{at}input_layernorm.weight", (w,)
            for name in ("q", "k", "v", "o"):
                yield f"{at}self_attn.{name}_proj.weight", (w, w)
                if self.style == "qwen2" and name != "o":
                    yield f"{at}self_attn.{name}_proj.bias", (w,)
            yield f"{at}post_attention_layernorm.weight", (w,)
            yield from [(f"{at}mlp.{name}_proj.weight", (inner, w)) for name in ("gate", "up")]
            yield f"{at}mlp.down_proj.weight", (w, inner)
        yield from [("model.norm.weight", (w,)), ("lm_head.weight", (v, w))]

    def numel(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    def config(self) -> dict[str, Any]:
        heads = max(1, self.width // 64)
        common = {"vocab_size": self.vocabulary, "torch_dtype": "bfloat16"}
        if self.style == "gpt2":
            own = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": 64}
            return {
                **common,
                **own,
                "n_embd": self.width,
                "n_layer": self.layers,
                "n_head": heads,
                "n_inner": self.inner,
            }
        name = {"llama": "Llama", "qwen2": "Qwen2"}[self.style]
        return {
            **common,
            "architectures": [f"{name}ForCausalLM"],
            "model_type": self.style,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }


SIZES = {
    "50M": Shape(16000, 512, 1408, 10),
    "500M": Shape(32000, 1536, 4096, 14),
    "3B": Shape(32000, 3072, 8192, 25),
}


def make(
    folder: Path, shape: Shape, seed: int, base_seed: int | None = None, *, unique: bool = False, step: float = STEP
) -> Path:
    """Write one checkpoint: a base (no `base_seed`), or the fine-tune number `seed` of that base.

    `step` is the fine-tune's standard deviation from its base. `unique` lengthens every tensor a little, each by
    another number, so that no two have one shape (nothing can run such a model, but merging it is the same).
    """
    folder.mkdir(parents=True)
    own = torch.Generator().manual_seed(seed)
    base = own if base_seed is None else torch.Generator().manual_seed(base_seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    written = size = 0
    index: dict[str, str] = {}

    def flush() -> None:
        nonlocal written
        written += 1
        name = f"model-{written:05d}.safetensors"
        save_file(shards[0], folder / name, {"format": "pt"})
        index.update(dict.fromkeys(shards[0], name))
        shards[0] = {}

    for number, (name, plain) in enumerate(shape.tensors()):
        dims = (plain[0] + number, *plain[1:]) if unique else plain
        tensor = torch.randn(dims, generator=base).mul_(SPREAD)
        if "norm" in name or "ln_" in name:
            tensor += 1.0 if name.endswith("weight") else 0.0
        tensor = tensor.bfloat16()
        if base_seed is not None:
            tensor = torch.randn(dims, generator=own).mul_(step).add_(tensor).bfloat16()
        if shards[0] and size + tensor.nbytes > _SHARD:
            flush()
            size = 0
        shards[0][name] = tensor
        size += tensor.nbytes
    if index:
        flush()
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    else:
        save_file(shards[0], folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    return folder
