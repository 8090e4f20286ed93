"""The dense models that can become experts: per-layer tensors, and what their class assumes where a config is silent.

Without the defaults an MoE class would put its own in place of the dense model's: rope_theta is 1e6 in Mixtral
and 1e4 in Llama.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model_fusion.mix.families.base import FFN

ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in "qkvo")
BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkvo")
_PRE = ("input_layernorm.weight", "post_attention_layernorm.weight")
_POST = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
_QK = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_COMMON: dict[str, Any] = {
    "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "rope_scaling": None, "rms_norm_eps": 1e-6, "attention_dropout": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Dense:
    """One dense architecture. `tensors` are the names a layer must have; `optional` may be there as well."""

    tensors: tuple[str, ...]
    optional: tuple[str, ...]
    defaults: Mapping[str, Any]


def _dense(norms: tuple[str, ...], optional: tuple[str, ...] = (), **defaults: Any) -> Dense:
    return Dense((*norms, *ATTENTION, *FFN), optional, {**_COMMON, **defaults})


DENSE: dict[str, Dense] = {
    "llama": _dense(_PRE, BIASES, max_position_embeddings=2048),
    "mistral": _dense(_PRE, (), max_position_embeddings=131072, sliding_window=4096, num_key_value_heads=8),
    "qwen2": _dense(_PRE, BIASES[:3], max_position_embeddings=32768, num_key_value_heads=32),
    "qwen3": _dense((*_PRE, *_QK), BIASES, max_position_embeddings=32768, head_dim=128, num_key_value_heads=32),
    "olmo2": _dense((*_POST, *_QK), BIASES, max_position_embeddings=2048, rms_norm_eps=1e-5),
    "granite": _dense(
        _PRE,
        BIASES,
        max_position_embeddings=2048,
        embedding_multiplier=1.0,
        logits_scaling=1.0,
        residual_multiplier=1.0,
        attention_multiplier=1.0,
    ),
}

_OTHER_ACTIVATION = "no stock MoE class has its norms and activation"
REFUSED: dict[str, str] = {
    "gemma": _OTHER_ACTIVATION,
    "gemma2": _OTHER_ACTIVATION,
    "gemma3": _OTHER_ACTIVATION,
    "gemma3_text": _OTHER_ACTIVATION,
    "phi": "its FFN has biases and no gate, and attention and FFN run in parallel; no stock MoE class has that",
    "phi3": "its gate and up projections are stored as one tensor, and PhiMoE uses other norms and biases",
    "gpt2": "its FFN has biases and no gate; no stock MoE class has that",
    "gpt_neox": "its FFN has biases and no gate; no stock MoE class has that",
    "bert": "it is no causal language model",
    "mixtral": "it is a mixture of experts already",
    "qwen2_moe": "it is a mixture of experts already",
    "qwen3_moe": "it is a mixture of experts already",
}
