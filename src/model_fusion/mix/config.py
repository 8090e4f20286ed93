"""The output's config.json: fields that transformers 4.57 and 5.x both read, and nothing left to a class's default."""

from collections.abc import Mapping
from typing import Any

from model_fusion.errors import InputError
from model_fusion.mix.families import Family
from model_fusion.mix.families.dense import DENSE

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TAKEN = (
    *REQUIRED, "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "tie_word_embeddings", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
SHAPES_BEHAVIOUR = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "sliding_window", "embedding_multiplier",
    "residual_multiplier", "attention_multiplier", "logits_scaling",
)  # fmt: skip
"""What must be equal in every expert: an FFN trained under another value would meet inputs it never saw."""


def read(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A dense model's config with its class's defaults filled in and rope in one form.

    rope_theta is a number, rope_scaling None or a dict with rope_type. Raises `InputError` for a missing size.
    """
    kind = str(raw.get("model_type"))
    config = {**DENSE[kind].defaults, **raw}
    absent = next((key for key in REQUIRED if not isinstance(config.get(key), int)), None)
    if absent is not None:
        raise InputError(f"{where}: config.json has no {absent}")
    config["rope_theta"], config["rope_scaling"] = _rope(config)
    config["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if kind in ("llama", "mistral", "granite"):
        config.setdefault("bos_token_id", 1)
        config.setdefault("eos_token_id", 2)
    elif kind == "olmo2":
        config.setdefault("pad_token_id", 1)
        config.setdefault("eos_token_id", 50279)
    return config


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    new = config.get("rope_parameters")
    scaling = dict(new) if isinstance(new, dict) else dict(config.get("rope_scaling") or {})
    theta = scaling.pop("rope_theta", None) or config["rope_theta"]
    scaling.pop("partial_rotary_factor", None)
    kind = scaling.pop("type", None) or "default"
    kind = scaling.pop("rope_type", kind)
    return float(theta), None if kind == "default" else {"rope_type": kind, **scaling}


def inexpressible(config: Mapping[str, Any], family: Family) -> str | None:
    """A feature of the dense config that the family's class cannot express, or None."""
    rotary = config.get("partial_rotary_factor") or (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    if rotary not in (None, 1, 1.0):
        return f"partial_rotary_factor {rotary}"
    if "auto_map" in config:
        return "remote code (auto_map)"
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or []):
        return "use_sliding_window (sliding_attention layers)"
    if config.get("sliding_window") and "sliding_window" not in family.keeps and config["model_type"] == "mistral":
        return f"sliding_window {config['sliding_window']}"
    if not family.own_head_dim and config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        return f"head_dim {config['head_dim']} (its class derives it from hidden_size)"
    return None


def write(
    dense: Mapping[str, Any],
    family: Family,
    *,
    experts: int,
    top_k: int,
    biased: bool,
    left_dense: list[int],
    shared_width: int,
    dtype: str,
) -> dict[str, Any]:
    """config.json of the mixed model. `left_dense`: layers that keep one FFN; `shared_width`: 0 for no such part."""
    scaling = dense["rope_scaling"]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: dense.get(key) for key in (*_TAKEN, *family.keeps)},
        **family.sets,
        "rope_theta": dense["rope_theta"],
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": dense["rope_theta"], **(scaling or {"rope_type": "default"})},
        family.count: experts,
        "num_experts_per_tok": top_k,
        family.width: dense["intermediate_size"],
        "torch_dtype": dtype,
    }
    if family.own_head_dim:
        config["head_dim"] = dense["head_dim"]
    if family.bias_key:
        config[family.bias_key] = biased
    if family.dense_layers:
        config[family.dense_layers] = left_dense
    if family.shared:
        config[family.shared.width] = shared_width
    return config
