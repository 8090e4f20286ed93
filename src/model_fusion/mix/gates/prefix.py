"""Naive Bayes on the text so far: which domain do the tokens up to here come from?

A router sees one token's hidden state, and a small model's hidden state says little about the domain: the evidence
lies in all tokens before. So each token carries its log counts (`token_table`), an attention head that looks at every
earlier token alike takes their running mean, and the router reads that mean (`mix/room.py` makes the place for it).
"""

import torch
from torch import Tensor

from model_fusion.mix.gates.base import Gate, GateInputs
from model_fusion.mix.gates.temperature import sharpen


def token_table(counts: list[Tensor]) -> Tensor:
    """counts: one integer [V] a domain → [V, E] float32: log counts, less their mean over the domains.

    Domains are scaled to one size and one half is added (Jeffreys), so a token that no domain has says nothing.
    """
    sizes = [float(c.sum()) for c in counts]
    size = sum(sizes) / len(sizes)
    table = torch.stack([(c.double() * (size / n) + 0.5).log() for c, n in zip(counts, sizes, strict=True)], dim=1)
    return (table - table.mean(1, keepdim=True)).float()


def prefix(inputs: GateInputs) -> Tensor:
    """Every expert's row reads its own running mean; per layer, the sharpness that best tells the domains apart."""
    rows = torch.zeros(inputs.layers, inputs.experts, inputs.hidden_size)
    own = torch.eye(inputs.experts).expand(inputs.layers, -1, -1)
    rows[..., inputs.means] = sharpen(own, inputs.statistics())
    return rows


PREFIX = Gate("prefix", "statistics", prefix)
