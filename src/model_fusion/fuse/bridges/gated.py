"""`gated` (Gated Linear Aligned Fusion): at chosen layers, per token, h' = (1 - g) h + g proj(x).

g = sigmoid(W [h; x] + b) with b starting at -3 or lower, so that an untrained bridge barely disturbs the LLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError
from model_fusion.fuse.bridges.base import Bridge, BridgeConfig, Entry, LLMShape, Signal, flat, resolve_layer
from model_fusion.fuse.by_name import ByName


@dataclass(frozen=True)
class Gated(BridgeConfig):
    """Gates after decoder layers `layers` (negative: from the end), through one hidden layer of `width` units."""

    kind: ClassVar[str] = "gated"
    training: ClassVar[Mapping[str, Any]] = {"batch_size": 16, "learning_rate": 2e-3, "target": (1.0, 0.01)}
    layers: tuple[int, ...] = (-5,)
    width: int = 256
    gate_bias: float = -3.0

    def build(self, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> GatedBridge:
        if not self.layers or self.width < 1:
            raise InputError("gated: name at least one layer, and a width of at least 1")
        if self.gate_bias > -3:
            raise InputError(f"gated: gate_bias must be -3 or lower, got {self.gate_bias}")
        return GatedBridge(self, base, experts)


class Gate(nn.Module):
    """One gate of one expert at one layer; proj(x) is scaled to the size (root mean square) of h, token by token."""

    def __init__(self, inputs: int, width: int, hidden: int, bias: float) -> None:
        super().__init__()
        self.inner = Entry(inputs, width)
        self.outer = nn.Linear(width, hidden)
        self.gate = nn.Linear(2 * hidden, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, bias)

    def project(self, values: Tensor) -> Tensor:
        """[N, T * D] -> unit-size directions [N, H]."""
        out: Tensor = self.outer(nn.functional.gelu(self.inner(values)))
        return out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, hidden: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """The gated difference g (proj(x) - h) [B, Q, H] and g [B, Q, 1]."""
        size = hidden.pow(2).mean(-1, keepdim=True).sqrt()
        unit = hidden / (size + 1e-6)
        x = direction[:, None].expand_as(hidden)
        gate = torch.sigmoid(self.gate(torch.cat([unit, x], dim=-1)))
        return gate * (x * size - hidden), gate


class GatedBridge(Bridge):
    kind = "gated"
    frozen_prompt = True

    def __init__(self, config: Gated, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(base, experts)
        self.at = tuple(sorted({resolve_layer(layer, base.layers) for layer in config.layers}))
        self.frozen_below = self.at[0]
        self.gates = nn.ModuleDict(
            {
                f"{layer}": ByName(
                    {name: Gate(t * d, config.width, base.hidden, config.gate_bias) for name, (t, d) in experts.items()}
                )
                for layer in self.at
            }
        )

    def layers(self) -> tuple[int, ...]:
        return self.at

    def after_layer(self, layer: int, hidden: Tensor, signal: Signal) -> Tensor:
        change, _ = self.contributions(layer, hidden.float(), signal)
        return (hidden.float() + change).to(hidden.dtype)

    def contributions(self, layer: int, hidden: Tensor, signal: Signal) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the gated differences [B, Q, H] over experts and occurrences, and each expert's largest gate
        [B, Q]. Rows and positions without the expert get exactly 0 through `where`, never through 0 * x."""
        total = torch.zeros_like(hidden)
        values: dict[str, Tensor] = {}
        for number, name in enumerate(self.names):
            gate: Gate = self.gates[f"{layer}"][name]  # type: ignore[index]
            t, d = self.shapes[name]
            shown = torch.zeros(hidden.shape[:2], dtype=hidden.dtype, device=hidden.device)
            for o in range(signal.index.shape[1]):
                here = signal.active[:, :, o] & (signal.index[:, o] == number)[:, None]
                if not here.any():
                    continue
                direction = gate.project(flat(signal.values[:, o, :t, :d], signal.mask[:, o, :t]))
                difference, value = gate(hidden, direction)
                total = total + torch.where(here[..., None], difference, torch.zeros((), dtype=hidden.dtype))
                shown = torch.where(here, torch.maximum(shown, value[..., 0]), shown)
            values[name] = shown
        return total, values
