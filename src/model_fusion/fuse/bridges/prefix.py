"""`prefix` (state-space prompt injection): features become N soft tokens at the placeholder in the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError
from model_fusion.fuse.bridges.base import Bridge, BridgeConfig, Entry, LLMShape, flat
from model_fusion.fuse.by_name import ByName


@dataclass(frozen=True)
class Prefix(BridgeConfig):
    """`tokens` soft tokens an occurrence, through one hidden layer of `width` units. `codes`: see `SoftTokens`."""

    kind: ClassVar[str] = "prefix"
    training: ClassVar[Mapping[str, Any]] = {"batch_size": 8, "learning_rate": 5e-3, "target": (1.0, 0.01)}
    tokens: int = 4
    width: int = 256
    codes: int = 0

    def build(self, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> PrefixBridge:
        if self.tokens < 1 or self.width < 1 or self.codes < 0:
            raise InputError(
                f"prefix: tokens and width must be at least 1 and codes at least 0, "
                f"got {self.tokens}, {self.width} and {self.codes}"
            )
        return PrefixBridge(self, base, experts)


SHARPNESS = 4.0
"""Of the mixture of codes: between two words lies neither, so that a mixture should be one of them almost always."""


class SoftTokens(nn.Module):
    """[N, T * D] -> [N, tokens, H], starting near a typical embedding: the mean plus noise of embedding size.

    With `codes`, the output is a mixture of that many learned codes, each one `tokens` rows: an expert that says
    one of a few things is then read as exactly one of them, whatever its features' size."""

    def __init__(self, inputs: int, tokens: int, width: int, base: LLMShape, codes: int = 0) -> None:
        super().__init__()
        self.tokens, self.scale, self.codes = tokens, base.embedding_rms, codes
        self.inner = Entry(inputs, width)
        self.outer = nn.Linear(width, codes or tokens * base.hidden)
        nn.init.normal_(self.inner.linear.weight, std=self.inner.linear.in_features**-0.5)
        # Codes start mixed evenly: a sharp choice made by chance would have no gradient to undo it.
        nn.init.normal_(self.outer.weight, std=(0.02 if codes else 1.0) * width**-0.5)
        if codes:
            self.codebook = nn.Parameter(torch.randn(codes, tokens * base.hidden))
        else:
            nn.init.normal_(self.outer.bias, std=0.5)

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.outer(nn.functional.gelu(self.inner(values)))
        if self.codes:
            out = (SHARPNESS * out).softmax(dim=-1) @ self.codebook
        return self.scale * out.view(*out.shape[:-1], self.tokens, -1)

    def start_at(self, rows: Tensor) -> list[nn.Parameter]:
        """Make `rows` float32 [K, tokens, H] the first codes, as many as there are; returns what is left to fit."""
        if not self.codes:
            return list(self.parameters())
        with torch.no_grad():
            known = rows[: self.codes].flatten(1) / self.scale
            self.codebook[: len(known)] = known.to(self.codebook)
        return [*self.inner.parameters(), *self.outer.parameters()]


class PrefixBridge(Bridge):
    kind = "prefix"
    frozen_prompt = True

    def __init__(self, config: Prefix, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(base, experts)
        self.tokens = config.tokens
        self.takes_space = config.codes > 0
        self.soft = ByName(
            {
                name: SoftTokens(t * d, config.tokens, config.width, base, config.codes)
                for name, (t, d) in experts.items()
            }
        )

    def slots(self, expert: str) -> int:
        return self.tokens

    def embed(self, expert: str, values: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.soft[expert](flat(values, mask))
        return out

    def start_at(self, expert: str, rows: Tensor) -> list[nn.Parameter]:
        soft = self.soft[expert]
        assert isinstance(soft, SoftTokens)
        return soft.start_at(rows)
