"""SafeMERGE's cosine of every tensor of a model: which of its changes left the direction of alignment."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from model_fusion.architecture.roles import role_of
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.errors import InputError
from model_fusion.merge.methods.safemerge import cosine


@dataclass(frozen=True)
class TensorCosine:
    """`layer` is None outside the layer stack."""

    tensor: str
    layer: int | None
    cosine: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cosines(child: Checkpoint, base: Checkpoint, aligned: Checkpoint, unaligned: Checkpoint) -> list[TensorCosine]:
    """cos(P Δ, Δ), Δ = child − base, P from aligned − unaligned, of each float tensor that all four hold in one shape.

    **Raises** InputError where there is none.
    """
    found = []
    for name in child.names:
        own = child.spec(name)
        if not own.dtype.is_floating_point or any(
            name not in other or other.spec(name).shape != own.shape for other in (base, aligned, unaligned)
        ):
            continue
        with torch.inference_mode():
            parts = [c.read(name).float() for c in (child, base, aligned, unaligned)]
            value = cosine(parts[0] - parts[1], parts[2] - parts[3])
        found.append(TensorCosine(name, role_of(name).layer, value))
    if not found:
        raise InputError(f"{child.source.spec} shares no tensor with {base.source.spec} and the aligned model")
    return found
