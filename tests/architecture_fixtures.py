"""Tiny random transformers models of many families, saved as their publishers would save them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
PLAIN = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
EYE = {k: v for k, v in PLAIN.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
DEEP = TEXT | LATENT | ROUTED | {"num_key_value_heads": 2, "head_dim": 4, "moe_intermediate_size": 8}
QWEN_EYE = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _llava() -> Any:
    text, eye = t.LlamaConfig(**TEXT), t.CLIPVisionConfig(**EYE)
    return t.LlavaForConditionalGeneration(t.LlavaConfig(text_config=text, vision_config=eye, image_token_index=5))


def _qwen2_vl() -> Any:
    config = t.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": MROPE}, vision_config=QWEN_EYE)
    return t.Qwen2VLForConditionalGeneration(config)


def _gemma3_vl() -> Any:
    config = t.Gemma3Config(text_config=dict(TEXT), vision_config=dict(EYE), mm_tokens_per_image=4)
    return t.Gemma3ForConditionalGeneration(config)


def _t5() -> Any:
    return t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**TEXT)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**TEXT, num_local_experts=2)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**TEXT, **MOE, mlp_only_layers=[0])),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**DEEP)),
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**PLAIN)),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**EYE)),
    "t5": _t5,
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
    "gemma3_vl": _gemma3_vl,
}


def save(kind: str, folder: Path, seed: int) -> Path:
    """A random bfloat16 model of that kind in `folder`."""
    torch.manual_seed(seed)
    MODELS[kind]().to(torch.bfloat16).save_pretrained(folder)
    return folder
