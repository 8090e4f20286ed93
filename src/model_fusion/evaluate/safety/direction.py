"""The refusal direction: where in a model's hidden states harmful and harmless requests part.

Arditi et al. 2024 (arXiv 2406.11717, section 2.3): the difference of mean hidden states at the last token of the
prompt, layer by layer. It is taken from one model on one half of the prompts, and every model is measured along it on
the other half: on its own half, any direction separates. The layer that counts is chosen there as well, by directions
of one quarter measured on the other: the best layer of the measured half would flatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from model_fusion.evaluate.safety.prompts import Prompts
from model_fusion.evaluate.safety.refusal import encoded, rendered


@dataclass(frozen=True)
class Separation:
    """How far harmful and benign requests lie apart along a direction, layer by layer (0: the embedding).

    distance: difference of the means in pooled standard deviations. ordered: how often a harmful request lies further
    along it than a benign one (0.5: chance).
    """

    distance: tuple[float, ...]
    ordered: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class States:
    """Hidden states at the last prompt token, float32 [N, L + 1, D]."""

    harmful: Tensor
    benign: Tensor

    def half(self, odd: bool) -> States:
        """Every second prompt."""
        return States(self.harmful[int(odd) :: 2], self.benign[int(odd) :: 2])


@torch.no_grad()
def states(model: Any, tokenizer: Any, prompts: Prompts, *, batch_size: int = 16) -> States:
    """What a model holds at the end of each prompt."""
    return States(*(_last(model, tokenizer, texts, batch_size) for texts in (prompts.harmful, prompts.benign)))


def _last(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int) -> Tensor:
    found = []
    for start in range(0, len(texts), batch_size):
        lines = [rendered(tokenizer, text) for text in texts[start : start + batch_size]]
        batch = encoded(tokenizer, lines).to(model.device)
        hidden = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        found.append(torch.stack([layer[:, -1].float().cpu() for layer in hidden], dim=1))  # left padding: -1 is last
    return torch.cat(found)


def direction(found: States) -> Tensor:
    """Unit vectors [L + 1, D]: mean of harmful − mean of benign; zero where they do not differ."""
    difference = found.harmful.mean(0) - found.benign.mean(0)
    size: Tensor = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    return difference.div(size.clamp_min(1e-12))


ENOUGH = 8
"""Requests of a kind without which quarters have no spread."""


@dataclass(frozen=True, order=True)
class Found:
    """How well a model's own direction tells unseen requests apart, at its best layer. Ordered: the better is larger,
    first by `ordered`, which few requests soon bring to 1, then by `distance`; of equals the earlier layer."""

    ordered: float
    distance: float
    before: int

    @property
    def layer(self) -> int:
        return -self.before


def best_layer(found: States) -> Found:
    """Of the states that a direction is taken from: each half's direction measured on the other half, and the mean."""
    one, other = found.half(False), found.half(True)
    both = [separation(other, direction(one)), separation(one, direction(other))]
    return max(
        Found(sum(part.ordered[i] for part in both) / 2, sum(part.distance[i] for part in both) / 2, -i)
        for i in range(len(both[0].ordered))
    )


def separation(found: States, along: Tensor) -> Separation:
    """Of the states' projections on unit vectors [L + 1, D]."""
    bad, good = ((part * along).sum(-1).double() for part in (found.harmful, found.benign))  # [N, L + 1]
    spread = ((bad.var(0, unbiased=True) + good.var(0, unbiased=True)) / 2).sqrt()
    distance = torch.nan_to_num((bad.mean(0) - good.mean(0)) / spread.clamp_min(1e-12))
    further = (bad[:, None] > good[None]).double() + 0.5 * (bad[:, None] == good[None]).double()
    return Separation(tuple(distance.tolist()), tuple(further.mean((0, 1)).tolist()))
