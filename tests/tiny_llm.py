"""A tiny random Llama with a vocabulary of the words it is given: bridges train on it in under a second."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def word_tokenizer(sentences: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word, no chat template."""
    words = sorted(set(" ".join(sentences).split()))
    table = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    fast = Tokenizer(WordLevel(table, unk_token="<unk>"))
    fast.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + 4,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=True,
            initializer_range=0.3,  # large enough that a bridge can decide the next word
        )
    ).eval()
