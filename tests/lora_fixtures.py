"""Tiny random Llama and GPT-2 checkpoints on disk, and peft adapters on them."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

LLAMA = ["q_proj", "v_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj"]


def llama(seed: int = 0, **config: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "initializer_range": 0.2, **config})).eval()


def gpt2(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()


def adapter(model: PreTrainedModel, folder: Path, seed: int = 1, **settings: Any) -> PreTrainedModel:
    """Saves a random LoRA of `model`; returns the model with the adapter merged into it (by peft)."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still uses a name that transformers deprecates
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    merged: PreTrainedModel = wrapped.merge_and_unload()
    return merged
