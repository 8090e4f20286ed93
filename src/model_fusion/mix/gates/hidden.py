"""mergekit's `hidden` and `hidden_avg`: the BASE model's residual stream entering a layer, at unit length.

The router sees another vector, the stream after attention and its norm; `mean` and `ridge` use that one.
"""

from torch import Tensor

from model_fusion.mix.gates.base import Gate, GateInputs, contrast, unit


def hidden(inputs: GateInputs) -> Tensor:
    """At each prompt's last token; mergekit/moe/router.py, get_hidden_states with average=False."""
    return unit(contrast(inputs.hidden(False, False), inputs.hidden(False, True))).transpose(0, 1)


def hidden_avg(inputs: GateInputs) -> Tensor:
    """Averaged over each prompt's tokens."""
    return unit(contrast(inputs.hidden(True, False), inputs.hidden(True, True))).transpose(0, 1)


HIDDEN = Gate("hidden", "prompts", hidden)
HIDDEN_AVG = Gate("hidden_avg", "prompts", hidden_avg)
