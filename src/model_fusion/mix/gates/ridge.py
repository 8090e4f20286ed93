"""Ridge regression of the domain on the true router input x (Hoerl and Kennard 1970): W = (XᵀX + λI)⁻¹ XᵀY.

Y is one-hot, so column d of XᵀY is the sum of domain d's inputs: a domain needs only XᵀX, Σx and its count, and
a new one leaves the others' untouched. No bias, so every stock router can express it. Domains weigh the same,
however many tokens each has.
"""

import torch
from torch import Tensor

from model_fusion.mix.gates.base import Gate, GateInputs
from model_fusion.mix.gates.temperature import sharpen


def solve(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """gram [H, H] = XᵀX, cross [H, E] = XᵀY, both float64 → W [E, H]. λ = strength · trace(XᵀX) / H."""
    size = gram.shape[-1]
    penalty = strength * gram.trace() / size
    weights: Tensor = torch.linalg.solve(gram + penalty * torch.eye(size, dtype=gram.dtype), cross)
    return weights.T


def ridge(inputs: GateInputs) -> Tensor:
    domains = inputs.statistics()
    rows = []
    for layer in range(inputs.layers):
        gram = sum((d.gram[layer] / d.count for d in domains), torch.zeros((), dtype=torch.float64))
        cross = torch.stack([d.total[layer] / d.count for d in domains], dim=1)
        rows.append(solve(gram, cross, inputs.ridge))
    return sharpen(torch.stack(rows).float(), domains)


RIDGE = Gate("ridge", "statistics", ridge)
