"""SafeMERGE: where a tensor's change leaves the direction of alignment, it is merged with the safe model's.

Djuhera et al. 2025 (arXiv 2503.17239, sections 3.1 and 3.2), with the projection of Safe LoRA (Hsu et al. 2024,
arXiv 2405.16833): V = aligned − unaligned, P = V Vᵀ / ‖V‖, and the tensor is merged where cos(P Δ, Δ) is below a
threshold. The paper takes LoRA products for Δ; here Δ is the model's change from the base, whatever made it.

`add` is RESTA's way instead (Bhardwaj et al. 2024, arXiv 2402.11746, section 3): the safety vector V is added, and
nothing of the child is taken away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.base import Key, Method, NoParams, Sees, check_unit, register


@dataclass(frozen=True)
class SafeMergeParams:
    """threshold: tensors whose cosine lies below it are merged (2 merges all, −2 none).

    safe_weight: there, w in (1 − w) · child + w · safe; with `add`, in child + w · (aligned − unaligned).
    """

    threshold: float = 0.35
    safe_weight: float = 0.2
    add: bool = False

    def __post_init__(self) -> None:
        if not self.add:
            check_unit("safe_weight", self.safe_weight)
        elif self.safe_weight < 0:
            raise InputError(f"safe_weight must be at least 0, got {self.safe_weight:g}")


def cosine(change: Tensor, alignment: Tensor) -> float:
    """cos(P Δ, Δ) with P = V Vᵀ / ‖V‖ for Δ `change` and V `alignment`, float [out, …] of one shape; 0 where either is
    zero. V (Vᵀ Δ) or (V Vᵀ) Δ, whichever product is smaller. A vector counts as one column."""
    delta, vector = (t.float().reshape(t.shape[0] if t.dim() else 1, -1) for t in (change, alignment))
    size = torch.linalg.vector_norm(vector)
    if size == 0 or not torch.any(delta):
        return 0.0
    vector = vector / size  # a cosine does not see the scale, and this keeps squares in range
    rows, columns = vector.shape
    projected = vector @ (vector.T @ delta) if rows > columns else (vector @ vector.T) @ delta
    cos = torch.nn.functional.cosine_similarity(projected.flatten().double(), delta.flatten().double(), dim=0)
    return float(cos)


def _safemerge(
    models: Sequence[Tensor],
    base: Tensor | None,
    model_params: Sequence[NoParams],
    params: SafeMergeParams,
    key: Key,
) -> Tensor:
    """Models are the child, the safe model, then what alignment is measured from: aligned (the safe model, unless
    given) and unaligned (the base, unless given)."""
    assert base is not None
    child, safe = models[0], models[1]
    aligned = models[2] if len(models) > 2 else safe
    unaligned = models[3] if len(models) > 3 else base
    if cosine(child - base, aligned - unaligned) >= params.threshold:
        return child
    if params.add:
        return child + params.safe_weight * (aligned - unaligned)
    return torch.lerp(child, safe, params.safe_weight)


register(Method("safemerge", Sees.WHOLE_TENSOR, SafeMergeParams, NoParams, "required", 2, 4, whole=_safemerge))
