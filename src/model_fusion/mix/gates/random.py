"""Gates that know nothing: mergekit's `random` and `uniform_random`."""

import math

import torch
from torch import Tensor

from model_fusion.mix.gates.base import Gate, GateInputs


def _generator(inputs: GateInputs) -> torch.Generator:
    return torch.Generator().manual_seed(inputs.seed)


def random(inputs: GateInputs) -> Tensor:
    """N(0, 1)."""
    return torch.randn(inputs.layers, inputs.experts, inputs.hidden_size, generator=_generator(inputs))


def uniform_random(inputs: GateInputs) -> Tensor:
    """U(−1/√H, 1/√H), as torch.nn.Linear starts."""
    shape = (inputs.layers, inputs.experts, inputs.hidden_size)
    return (torch.rand(shape, generator=_generator(inputs)) * 2 - 1) * math.sqrt(1 / inputs.hidden_size)


RANDOM = Gate("random", "nothing", random)
UNIFORM_RANDOM = Gate("uniform_random", "nothing", uniform_random)
