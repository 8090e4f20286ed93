"""What a gate may ask for, and what it returns: one matrix [E, H] for every mixed layer. Knows no file."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model_fusion.mix.statistics import Statistics

Needs = Literal["nothing", "embeddings", "prompts", "statistics"]


@dataclass(frozen=True)
class GateInputs:
    """layers L, experts E, hidden H; means: the channels of the running means (gate prefix).
    The callables are only called by gates that need them.

    embeddings(negative): per expert, the mean over its prompts of the summed token embeddings [H].
    hidden(average, negative): per expert, the residual stream entering each layer [L, H], mean over prompts, at the
    last token or averaged over tokens. `negative` asks for the negative prompts; None where an expert has none.
    statistics(): one a domain, in the experts' order.
    """

    layers: int
    experts: int
    hidden_size: int
    seed: int
    ridge: float
    embeddings: Callable[[bool], list[Tensor | None]]
    hidden: Callable[[bool, bool], list[Tensor | None]]
    statistics: Callable[[], list["Statistics"]]
    means: slice = field(default_factory=lambda: slice(0))


@dataclass(frozen=True)
class Gate:
    """One way to start the routers. `make` returns float32 [L, E, H]."""

    name: str
    needs: Needs
    make: Callable[[GateInputs], Tensor]


def unit(vectors: Tensor) -> Tensor:
    """Rows scaled to length one, as mergekit does."""
    scaled: Tensor = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return scaled


def contrast(positive: list[Tensor | None], negative: list[Tensor | None]) -> Tensor:
    """[E, …]: positive minus negative, where there are negative prompts."""
    rows = [p - n if n is not None else p for p, n in zip(positive, negative, strict=True) if p is not None]
    return torch.stack(rows)
