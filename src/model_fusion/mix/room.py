"""Room for a running mean in a stock class: the residual stream and the attention grow, what was there stays as it was.

New residual channels: each token's log counts (in the embedding), then their running mean. One new attention group has
zero queries and keys, so it weighs all earlier tokens alike (rotation leaves zero at zero); in layer 0 it averages the
first channels into the second. Everything else is padded with zeros. The new channels hold numbers 2⁻¹⁶ times those
beside them, so they add nothing to a norm's mean square; the norms' weights scale them back up. A mean square over more
channels is smaller by a constant, which the norms' weights and eps undo.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

_SMALL = 2.0**-16
_ALIGN = 8


@dataclass(frozen=True)
class Room:
    """Sizes of a dense model (hidden H, heads, kv groups of head_dim) that gets room for E running means."""

    hidden: int
    heads: int
    groups: int
    head_dim: int
    experts: int
    eps: float

    @classmethod
    def of(cls, dense: Mapping[str, Any], experts: int) -> "Room":
        """dense: a config as `mix.config.read` gives it."""
        return cls(
            int(dense["hidden_size"]),
            int(dense["num_attention_heads"]),
            int(dense["num_key_value_heads"]),
            int(dense["head_dim"]),
            experts,
            float(dense["rms_norm_eps"]),
        )

    @property
    def width(self) -> int:
        """The grown residual stream: a multiple of the grown number of heads, which some config classes insist on."""
        unit = lcm(_ALIGN, self.heads + self.heads // self.groups)
        return -(-(self.hidden + 2 * self.experts) // unit) * unit

    @property
    def counts(self) -> slice:
        """The channels that hold a token's own log counts."""
        return slice(self.hidden, self.hidden + self.experts)

    @property
    def means(self) -> slice:
        """The channels that hold the running means."""
        return slice(self.hidden + self.experts, self.hidden + 2 * self.experts)

    @property
    def shrink(self) -> float:
        """What growing does to a root mean square."""
        return float((self.hidden / self.width) ** 0.5)

    def config(self) -> dict[str, Any]:
        """The config fields that change."""
        return {
            "hidden_size": self.width,
            "num_attention_heads": self.heads + self.heads // self.groups,
            "num_key_value_heads": self.groups + 1,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.eps * self.hidden / self.width,
        }

    def grown(self, name: str) -> tuple[int, int]:
        """(rows, columns) that a dense tensor gets; of a vector, a bias grows by rows and a norm by columns."""
        more, part = self.width - self.hidden, name.split(".")[-2]
        queries, values = self.heads // self.groups * self.head_dim, self.head_dim
        return {
            "q_proj": (queries, more), "k_proj": (values, more), "v_proj": (values, more), "o_proj": (more, queries),
            "gate_proj": (0, more), "up_proj": (0, more), "down_proj": (more, 0),
            "embed_tokens": (0, more), "lm_head": (0, more),
            "norm": (0, more), "input_layernorm": (0, more), "post_attention_layernorm": (0, more),
        }.get(part, (0, 0))  # fmt: skip

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        rows, columns = self.grown(name)
        if len(shape) == 1:
            return (shape[0] + (rows if name.endswith(".bias") else columns),)
        return (shape[0] + rows, shape[1] + columns)


@dataclass(frozen=True)
class Evidence:
    """What goes into the room. table [V, E]; size: root mean square of the embedding's rows; gains [L of the model]:
    what makes each layer's running means, as its router sees them, of size one."""

    table: Tensor
    size: float
    gains: Tensor

    @classmethod
    def of(cls, table: Tensor, embedding: Tensor, layers: int) -> "Evidence":
        """With gains still to be measured: all one."""
        return cls(table, float(embedding.float().square().mean().sqrt()), torch.ones(layers))


def widen(name: str, tensor: Tensor, room: Room, evidence: Evidence) -> Tensor:
    """A dense tensor, by its dense name, with room for the evidence; dtype as it was."""
    old, new = tuple(tensor.shape), room.shape(name, tuple(tensor.shape))
    made = pad(tensor.float(), [side for a, b in zip(reversed(old), reversed(new), strict=True) for side in (0, b - a)])
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
    if name.endswith("norm.weight") and old != new:
        made[: room.hidden] *= room.shrink
    if name.endswith("embed_tokens.weight"):
        size = (tensor.float().square().mean(1, keepdim=True) + room.eps).sqrt()  # layer 0's norm divides by it
        made[:, room.counts] = _SMALL * size * evidence.table
    elif name.endswith("input_layernorm.weight") and layer == 0:
        made[room.counts] = room.shrink / _SMALL
    elif name.endswith("v_proj.weight") and layer == 0:
        start = room.groups * room.head_dim
        made[start : start + room.experts, room.counts] = torch.eye(room.experts)
    elif name.endswith("o_proj.weight") and layer == 0:
        start = room.heads * room.head_dim
        made[room.means, start : start + room.experts] = _SMALL * evidence.size * torch.eye(room.experts)
    elif name.endswith("post_attention_layernorm.weight"):
        made[room.means] = evidence.gains[layer] / (_SMALL * evidence.size)
    return made.to(tensor.dtype)
