"""Tiny random LLMs of four architectures, two experts, and fused models of them: what the contract tests share."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from model_fusion.fuse.bridges import BridgeConfig, CrossAttention, Gated, Logit, Lora, Prefix, Tool
from model_fusion.fuse.experts import Expert, Field, InputSchema
from model_fusion.fuse.experts.base import Features
from model_fusion.fuse.model import FusedModel

ARCHITECTURES = ("llama", "gpt2", "qwen3", "gemma3")
TRAINED: dict[str, BridgeConfig] = {
    "prefix": Prefix(tokens=2, width=16),
    "gated": Gated(layers=(0, 1), width=16),
    "lora": Lora(tokens=2, width=16, rank=2),
    "cross_attention": CrossAttention(layers=(0, 1), tokens=2, width=16, heads=2, head_dim=8),
}
UNTRAINED: dict[str, BridgeConfig] = {"logit": Logit(), "tool": Tool()}
TEXT = "should i hit or stick with this hand of cards? the table says yes or no, so tell me what to do now please"
SCHEMA = InputSchema((Field("x", "float"),))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer, trained on one sentence; no chat template, no spare special token. The rarest
    merges come last: ids that no prompt here contains are reserved for placeholders, as with GPT-2."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        [*[TEXT] * 4, "zqxj"],
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|pad|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", padding_side="left"
    )


@cache
def plain(architecture: str) -> Any:
    """The base LLM, never fused: random weights wide enough for answers to differ. Treat as read-only."""
    torch.manual_seed(1)
    size = len(tokenizer())
    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    shape: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        **ids,
    }
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3, **ids
        )
        return GPT2LMHeadModel(config).eval()
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=8)).eval()
    if architecture == "gemma3":
        kinds = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        return Gemma3ForCausalLM(Gemma3TextConfig(**shape, head_dim=8, query_pre_attn_scalar=8, **kinds)).eval()
    # Two rows more than the tokenizer has tokens: there the reserved ids are rows that no text can produce.
    return LlamaForCausalLM(LlamaConfig(**{**shape, "vocab_size": size + 2})).eval()


def chances(items: list[float]) -> np.ndarray:
    yes = 1 / (1 + np.exp(-4 * np.asarray(items)))
    return np.stack([yes, 1 - yes], axis=1)


def waves(items: list[float]) -> np.ndarray:
    x = np.asarray(items)[:, None, None]
    return np.asarray(np.sin(x * np.arange(1, 13).reshape(1, 3, 4)))


@cache
def experts() -> dict[str, Expert]:
    """`sign`: a classifier, features [1, 4]. `series`: three values of four numbers, no decision."""
    return {
        "sign": Expert.from_callable(chances, SCHEMA, classes=("yes", "no")),
        "series": Expert.from_callable(waves, SCHEMA, output="features", feature_shape=(3, 4)),
    }


def build(
    architecture: str, bridge: BridgeConfig, *, awake: bool = True, only: str = "", dtype: Any = torch.float32
) -> FusedModel:
    """A fresh fused model. `awake`: moved off its start, as training does, so that each part has an effect."""
    base = copy.deepcopy(plain(architecture)).to(dtype)
    chosen = {name: expert for name, expert in experts().items() if only in ("", name)}
    fused = FusedModel.build(base, tokenizer=tokenizer(), experts=chosen, bridge=bridge).eval()
    for number, (name, expert) in enumerate(chosen.items()):
        encoded = expert.encode([x / 10 + number for x in range(-10, 10)])
        fused.normalisers[name].fit(Features(encoded.values, encoded.mask))
    if awake and fused.bridge.trainable:
        wake(fused)
    return fused


def wake(fused: FusedModel) -> None:
    """Set gates open and adapters off zero."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in [*fused.bridge.named_parameters(), *fused.base.named_parameters()]:
            if name.endswith(".gate.bias") or name.endswith(".gate"):
                nn.init.constant_(parameter, 0.7)
            elif "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)


@cache
def fused(architecture: str, bridge: str) -> FusedModel:
    """A fused model that tests share: leave it as you found it."""
    return build(architecture, {**TRAINED, **UNTRAINED}[bridge], only="sign" if bridge == "logit" else "")


PROMPTS = (
    "the table <|sign|> says hit or stick? ",
    "what to do now, please tell me so: <|sign|> yes or no or <|series|> this <|sign|> hand of cards",
    "no cards here",
)
INPUTS: tuple[dict[str, Any], ...] = ({"sign": 0.4}, {"sign": [-0.7, 0.9], "series": 0.3}, {})
