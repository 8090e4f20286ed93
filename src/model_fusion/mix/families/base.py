"""What a mixture-of-experts family is: one table. No family has a builder loop of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FFN = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")


@dataclass(frozen=True)
class Shared:
    """Always-on experts: their tensors (dense name → name on disk), the sigmoid gate's name, the width's key."""

    tensors: Mapping[str, str]
    gate: str
    width: str


@dataclass(frozen=True)
class Family:
    """One stock MoE class. Names are relative to `model.layers.{n}.` and are those published on disk.

    accepts: dense model types. experts: name on disk → dense tensors it is made of, joined along rows; with
    "{expert}" one tensor an expert, without it one stacked tensor [E, rows, columns]. gate: the router [E, H].
    routers: where the class keeps the router module (names differ between transformers versions). count: config key
    of the number of experts. biases: dense biases that the class has. keeps: config keys taken over from the dense
    model as they are. sets: constants. width: config key of the experts' intermediate size. own_head_dim: whether
    the class honours head_dim. dense_layers: config key of the layers left dense, where the class has one.
    mixes: what becomes experts. widens: whether the class takes the sizes of `mix.room`.
    router_input: the dense module whose input the router sees.
    """

    model_type: str
    architecture: str
    accepts: tuple[str, ...]
    experts: Mapping[str, tuple[str, ...]]
    gate: str
    routers: tuple[str, ...]
    count: str
    biases: frozenset[str] = frozenset()
    keeps: tuple[str, ...] = ()
    sets: Mapping[str, Any] = field(default_factory=dict)
    width: str = "intermediate_size"
    own_head_dim: bool = True
    bias_key: str | None = None
    dense_layers: str | None = None
    mixes: str = "ffn"
    widens: bool = False
    router_input: str = "mlp"
    shared: Shared | None = None
