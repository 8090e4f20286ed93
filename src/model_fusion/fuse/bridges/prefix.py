"""`prefix` (state-space prompt injection): features become N soft tokens at the placeholder in the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from model_fusion.errors import InputError
from model_fusion.fuse.bridges.base import Bridge, BridgeConfig, LLMShape, flat


@dataclass(frozen=True)
class Prefix(BridgeConfig):
    """`tokens` soft tokens an occurrence, through one hidden layer of `width` units."""

    kind: ClassVar[str] = "prefix"
    training: ClassVar[Mapping[str, Any]] = {"batch_size": 8, "learning_rate": 5e-3, "target": (1.0, 0.01)}
    tokens: int = 4
    width: int = 256

    def build(self, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> PrefixBridge:
        if self.tokens < 1 or self.width < 1:
            raise InputError(f"prefix: tokens and width must be at least 1, got {self.tokens} and {self.width}")
        return PrefixBridge(self, base, experts)


class SoftTokens(nn.Module):
    """[N, T * D] -> [N, tokens, H], starting near a typical embedding: the mean plus noise of embedding size."""

    def __init__(self, inputs: int, tokens: int, width: int, base: LLMShape) -> None:
        super().__init__()
        self.tokens, self.scale = tokens, base.embedding_rms
        self.inner = nn.Linear(inputs, width)
        self.outer = nn.Linear(width, tokens * base.hidden)
        nn.init.normal_(self.inner.weight, std=inputs**-0.5)
        nn.init.normal_(self.outer.weight, std=width**-0.5)
        nn.init.normal_(self.outer.bias, std=0.5)

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.outer(nn.functional.gelu(self.inner(values)))
        return self.scale * out.view(*out.shape[:-1], self.tokens, -1)


class PrefixBridge(Bridge):
    kind = "prefix"
    frozen_prompt = True

    def __init__(self, config: Prefix, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(base, experts)
        self.tokens = config.tokens
        self.soft = nn.ModuleDict(
            {name: SoftTokens(t * d, config.tokens, config.width, base) for name, (t, d) in experts.items()}
        )

    def slots(self, expert: str) -> int:
        return self.tokens

    def embed(self, expert: str, values: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.soft[expert](flat(values, mask))
        return out
