"""Normalisation of an expert's features: fitted on training inputs only, saved with the bridge."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError
from model_fusion.fuse.experts.base import Features


class Normaliser(nn.Module):
    """(x - mean) / std for each of D features; identity until `fit`. Outliers are clipped at +-`limit`."""

    def __init__(self, size: int, limit: float = 8.0) -> None:
        super().__init__()
        self.limit = limit
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.mean: Tensor
        self.std: Tensor
        self.fitted: Tensor

    def fit(self, features: Features) -> None:
        """Take mean and standard deviation from features float32 [B, T, D], over present values."""
        present = features.values[features.mask].double()
        if not len(present):
            raise InputError("no present feature to fit the normaliser on")
        std = present.std(dim=0, correction=0)
        self.mean.copy_(present.mean(dim=0))
        # A feature that never varies carries nothing; dividing by its tiny spread would blow up noise.
        self.std.copy_(torch.where(std > 1e-5, std, torch.ones_like(std)))
        self.fitted.fill_(True)

    def forward(self, values: Tensor) -> Tensor:
        return ((values.float() - self.mean) / self.std).clamp(-self.limit, self.limit)
