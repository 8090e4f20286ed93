"""A small module and its batches, for tests of what is measured on data."""

from typing import Any

import torch
from torch import nn

from tiny_llm import tiny_llama, word_tokenizer

Batches = list[Any]


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    sizes = [(6, 9), (9, 9), (9, 4)]
    parts = [part for a, b in sizes for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1]).to(dtype)


def vectors(seed: int = 1, dtype: torch.dtype = torch.float32) -> Batches:
    return list(torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)).to(dtype).split(3))


def llama(seed: int = 0) -> nn.Module:
    model = tiny_llama(word_tokenizer(["a b c d e f g"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05 * (seed > 0))
    return model


def tokens(rows: int = 3) -> Batches:
    ids = torch.randint(0, 7, (rows, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part} for part in ids.split(2)]
