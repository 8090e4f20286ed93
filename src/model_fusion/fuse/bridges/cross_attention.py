"""`cross_attention`: after chosen layers, hidden states attend to the expert's tokens through a tanh gate.

The gate starts at 0, so an untrained bridge is the identity exactly (Flamingo, arXiv 2204.14198, section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError
from model_fusion.fuse.bridges.base import Bridge, BridgeConfig, LLMShape, Signal, flat, resolve_layer
from model_fusion.fuse.bridges.prefix import SoftTokens
from model_fusion.fuse.by_name import ByName


@dataclass(frozen=True)
class CrossAttention(BridgeConfig):
    """Attention with `heads` heads of size `head_dim` over `tokens` expert tokens, after decoder layers `layers`."""

    kind: ClassVar[str] = "cross_attention"
    training: ClassVar[Mapping[str, Any]] = {"batch_size": 16, "learning_rate": 2e-3, "target": (1.0, 0.01)}
    layers: tuple[int, ...] = (-5,)
    tokens: int = 4
    width: int = 256
    heads: int = 4
    head_dim: int = 32

    def build(self, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> CrossAttentionBridge:
        if not self.layers or min(self.tokens, self.width, self.heads, self.head_dim) < 1:
            raise InputError("cross_attention: needs a layer, and tokens, width, heads and head_dim of at least 1")
        return CrossAttentionBridge(self, base, experts)


class Attend(nn.Module):
    """Multi-head attention of hidden states (queries) to the tokens of one occurrence, times tanh(gate)."""

    def __init__(self, hidden: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, heads * head_dim, bias=False)
        self.key = nn.Linear(hidden, heads * head_dim, bias=False)
        self.value = nn.Linear(hidden, heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, hidden, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden [B, Q, H], tokens [B, K, H] -> the change of hidden [B, Q, H]."""
        size = hidden.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, hidden / size), (self.key, tokens), (self.value, tokens))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        change: Tensor = torch.tanh(self.gate) * self.out(mixed) * size
        return change


class CrossAttentionBridge(Bridge):
    kind = "cross_attention"
    frozen_prompt = True

    def __init__(self, config: CrossAttention, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(base, experts)
        self.at = tuple(sorted({resolve_layer(layer, base.layers) for layer in config.layers}))
        self.frozen_below = self.at[0]
        unit = LLMShape(base.hidden, base.layers, 1.0, base.embedding_mean)
        self.soft = ByName(
            {name: SoftTokens(t * d, config.tokens, config.width, unit) for name, (t, d) in experts.items()}
        )
        self.attend = nn.ModuleDict(
            {f"{layer}": Attend(base.hidden, config.heads, config.head_dim) for layer in self.at}
        )

    def layers(self) -> tuple[int, ...]:
        return self.at

    def after_layer(self, layer: int, hidden: Tensor, signal: Signal) -> Tensor:
        wide = hidden.float()
        total = torch.zeros_like(wide)
        for number, name in enumerate(self.names):
            t, d = self.shapes[name]
            for o in range(signal.index.shape[1]):
                here = signal.active[:, :, o] & (signal.index[:, o] == number)[:, None]
                if not here.any():
                    continue
                tokens = self.soft[name](flat(signal.values[:, o, :t, :d], signal.mask[:, o, :t]))
                change = self.attend[f"{layer}"](wide, tokens)
                total = total + torch.where(here[..., None], change, torch.zeros((), dtype=wide.dtype))
        return (wide + total).to(hidden.dtype)
