"""The mean of the true router inputs of each domain, at unit length."""

import torch
from torch import Tensor

from model_fusion.mix.gates.base import Gate, GateInputs, unit
from model_fusion.mix.gates.temperature import sharpen


def mean(inputs: GateInputs) -> Tensor:
    domains = inputs.statistics()
    rows = torch.stack([unit(d.total / d.count) for d in domains], dim=1).float()
    return sharpen(rows, domains)


MEAN = Gate("mean", "statistics", mean)
