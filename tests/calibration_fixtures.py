"""A small module and its batches, for tests of what is measured on data."""

from typing import Any

import torch
from torch import nn

Batches = list[Any]


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    sizes = [(6, 9), (9, 9), (9, 4)]
    parts = [part for a, b in sizes for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1]).to(dtype)


def vectors(seed: int = 1, dtype: torch.dtype = torch.float32) -> Batches:
    return list(torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)).to(dtype).split(3))
