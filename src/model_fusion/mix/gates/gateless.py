"""No routing: every expert runs with equal weight, y = 1/E Σ FFN_e(x). Gate 0, top-k = E in a stock class."""

import torch
from torch import Tensor

from model_fusion.mix.gates.base import Gate, GateInputs


def gateless(inputs: GateInputs) -> Tensor:
    return torch.zeros(inputs.layers, inputs.experts, inputs.hidden_size)


GATELESS = Gate("gateless", "nothing", gateless)
