"""How the routers start. One idea a file; this is the registry."""

from model_fusion.mix.gates.base import Gate, GateInputs
from model_fusion.mix.gates.cheap_embed import CHEAP_EMBED
from model_fusion.mix.gates.gateless import GATELESS
from model_fusion.mix.gates.hidden import HIDDEN, HIDDEN_AVG
from model_fusion.mix.gates.mean import MEAN
from model_fusion.mix.gates.prefix import PREFIX
from model_fusion.mix.gates.random import RANDOM, UNIFORM_RANDOM
from model_fusion.mix.gates.ridge import RIDGE

GATES: dict[str, Gate] = {
    g.name: g for g in (RIDGE, PREFIX, MEAN, HIDDEN, HIDDEN_AVG, CHEAP_EMBED, RANDOM, UNIFORM_RANDOM, GATELESS)
}

__all__ = ["GATES", "Gate", "GateInputs"]
