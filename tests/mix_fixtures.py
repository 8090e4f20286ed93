"""Tiny random dense models of every kind that can be mixed, with the features that break other mixers."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "tie_word_embeddings": True,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "mixtral", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", "mixtral", {"sliding_window": 8}),
    "biased_llama": ("llama", "qwen2_moe", {"attention_bias": True, "rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", "qwen2_moe", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", "qwen3_moe", {"head_dim": 16, "attention_bias": True}),
    "olmo2": ("olmo2", "flex_olmo", {"attention_bias": True}),
    "granite": ("granite", "granitemoe", {"attention_bias": True, "embedding_multiplier": 2.0, "logits_scaling": 3.0,
                                          "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
}  # fmt: skip
"""Name → (dense model type, family it becomes, config)."""
TEXTS = {"letters": "abcdefgh ", "digits": "0123456789 "}


def bytes_tokenizer(folder: Path) -> None:
    """A tokenizer of 256 bytes, one token each."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def model(kind: str, seed: int, **config: Any) -> Any:
    """A random dense model, float32, every bias and norm different from its initial value."""
    model_type, _, extra = KINDS[kind]
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **extra, **config})).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.0 if kind == "biased_llama" and "o_proj" in name else 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return made


def write(folder: Path, kind: str = "llama", seed: int = 0, trunk: Any = None, **config: Any) -> Path:
    """Save a model; with `trunk`, all but its FFNs are that model's."""
    made = model(kind, seed, **config)
    if trunk is not None:
        kept = {k: v for k, v in trunk.state_dict().items() if ".mlp." not in k}
        made.load_state_dict(kept, strict=False)
    made.save_pretrained(folder)
    bytes_tokenizer(folder)
    return folder


def two_domains(folder: Path) -> dict[str, Any]:
    """A recipe of two Llamas with one trunk, and five files of random letters of its own for each."""
    logging.disable_progress_bar()
    trunk, generator, entries = model("llama", 0), torch.Generator().manual_seed(5), []
    for i, (name, letters) in enumerate(TEXTS.items()):
        write(folder / name, "llama", i, trunk)
        (folder / "texts" / name).mkdir(parents=True)
        for n in range(5):
            picks = torch.randint(len(letters), (300,), generator=generator)
            (folder / "texts" / name / f"{n}.txt").write_text("".join(letters[p] for p in picks))
        entries.append({"model": str(folder / name), "name": name, "texts": [str(folder / "texts" / name)]})
    return {"base_model": str(folder / "letters"), "experts": entries, "trunk": "require_equal"}
