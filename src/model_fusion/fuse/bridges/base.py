"""What a bridge is: an expert's features in, a change to the LLM's forward pass out. It knows no expert.

A bridge can act at three places, and each concrete bridge uses one or two of them:
`embed` writes rows of the embedding output at the expert's placeholder, `after_layer` changes the hidden
state that a decoder layer returns, `logits_processor` changes next-token scores while generating.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError


@dataclass(frozen=True)
class BridgeConfig:
    """Typed settings of one kind of bridge. `kind` is its registry name."""

    kind: ClassVar[str]
    training: ClassVar[Mapping[str, Any]] = {}
    """Training settings that suit this kind of bridge (fields of `TrainSettings`)."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}

    def build(self, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> Bridge:
        """A fresh bridge for `experts` (name -> (T, D) of its features)."""
        raise InputError(f"{type(self).__name__} builds no bridge")


@dataclass(frozen=True)
class LLMShape:
    """All that a bridge may know of the LLM: sizes, and the root mean square of its input embeddings."""

    hidden: int
    layers: int
    embedding_rms: float
    embedding_mean: Tensor
    """float32 [hidden]."""


@dataclass(frozen=True)
class Signal:
    """The experts' features of one forward pass, over O occurrences of placeholders a row (padded).

    values float32 [B, O, T, D] normalised; mask bool [B, O, T]; index int64 [B, O]: which expert, -1 for none;
    active bool [B, Q, O]: occurrence o stands at or before query position q.
    """

    values: Tensor
    mask: Tensor
    index: Tensor
    active: Tensor


class Bridge(nn.Module):
    """A trainable module between experts and a frozen LLM. Parameters stay float32 whatever the LLM's dtype."""

    kind: ClassVar[str]
    trainable: ClassVar[bool] = True
    uses_text: ClassVar[bool] = False
    """True where the placeholder is replaced by the expert's words before tokenisation (tool)."""
    frozen_below: int | None = None
    """Layers with an index up to and including this one see no change from the bridge: training may compute
    their output once. -1: nothing is computed identically except the prompt before the placeholder."""
    frozen_prompt: ClassVar[bool] = False
    """True where the LLM computes the prompt before the placeholder identically for every row."""
    takes_space: bool = False
    """True where the soft tokens stand for words: a word's token brings its own space, so that one space before
    the placeholder is left out of the ids."""

    def __init__(self, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.names = tuple(experts)
        self.shapes = dict(experts)
        self.hidden = base.hidden
        self.register_buffer("neutral", base.embedding_mean.float().clone(), persistent=True)
        self.neutral: Tensor

    def slots(self, expert: str) -> int:
        """How many reserved ids one occurrence of `expert`'s placeholder takes in the prompt."""
        return 1

    def embed(self, expert: str, values: Tensor, mask: Tensor) -> Tensor:
        """Embedding rows [N, slots, H] for N occurrences: values [N, T, D], mask [N, T]. Default: neutral."""
        return self.neutral.expand(len(values), self.slots(expert), -1)

    def start_at(self, expert: str, rows: Tensor) -> list[nn.Parameter]:
        """Take in `rows` float32 [K, slots, H], embeddings that `embed` shall come near; returns the parameters to
        be fitted for that. Default: none, the bridge has no such rows."""
        return []

    def layers(self) -> tuple[int, ...]:
        """Indices of decoder layers whose output this bridge changes."""
        return ()

    def after_layer(self, layer: int, hidden: Tensor, signal: Signal) -> Tensor:
        """The changed hidden state [B, Q, H] of a layer named by `layers`, in `hidden`'s dtype."""
        return hidden

    def attach(self, model: nn.Module, name: str) -> None:
        """Put what lives inside the LLM (adapters) there. Called once, after the base is frozen."""

    def detach(self, model: nn.Module, name: str) -> None:
        """Take out again what `attach` put in."""

    def hear(self, signal: Signal | None) -> None:
        """Told before each forward pass what it carries (None: no expert), for what lives inside the LLM. It holds
        until the next one, since gradient checkpointing runs layers again."""

    def set_enabled(self, model: nn.Module, name: str, enabled: bool) -> None:
        """Switch what lives inside the LLM on or off (adapters); hooks are the fused model's business."""

    def trainable_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]

    def save_extra(self, model: nn.Module, name: str, folder: Path) -> list[str]:
        """Write files beyond the bridge's own safetensors; their names, relative to `folder`."""
        return []

    def load_extra(self, model: nn.Module, name: str, folder: Path) -> None:
        """Read what `save_extra` wrote."""


def flat(values: Tensor, mask: Tensor) -> Tensor:
    """[N, T, D] with absent values zeroed (where, not a product: 0 * NaN is NaN), flattened to [N, T * D]."""
    return torch.where(mask[..., None], values, torch.zeros((), dtype=values.dtype)).flatten(1)


class Entry(nn.Module):
    """The first layer of a bridge, [N, inputs] -> [N, width].

    One or two numbers (a regressor's value) come with their sines and cosines at four octaves: a network cannot
    tell near values apart by the plain number (Fourier features, Tancik et al. 2020, section 4)."""

    FEW = 2
    OCTAVES = (1.0, 2.0, 4.0, 8.0)

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.few = inputs <= self.FEW
        self.linear = nn.Linear(inputs * (1 + 2 * len(self.OCTAVES)) if self.few else inputs, width)

    def forward(self, numbers: Tensor) -> Tensor:
        if self.few:
            angles = torch.cat([numbers * (octave * math.pi / 4) for octave in self.OCTAVES], dim=-1)
            numbers = torch.cat([numbers, angles.sin(), angles.cos()], dim=-1)
        out: Tensor = self.linear(numbers)
        return out


def resolve_layer(layer: int, layers: int) -> int:
    """Negative indices count from the end, as in a list. Raises InputError when out of range."""
    resolved = layer + layers if layer < 0 else layer
    if not 0 <= resolved < layers:
        raise InputError(f"layer {layer} does not exist: this LLM has layers 0 to {layers - 1}")
    return resolved
