"""Is a task vector a LoRA's? Methods that make all directions equally strong are refused on those."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.measures import spectra
from model_fusion.merge.methods.blocks import delta_square, parts, total

LOW = 8
"""A rank is far below full where it is at most min(m, n) ÷ LOW."""


def numerical_rank(model: Tensor, base: Tensor) -> int | None:
    """Singular values of model − base above what rounding to their storage dtypes makes; None: full, more than 64, or
    no difference at all.

    The dtype is the shortest that holds every value: a bf16 checkpoint may come as float32.
    """
    totals = (_square(model), _square(base), delta_square(model, base))
    found = spectra([_narrow(model)], _narrow(base), [totals])[0]
    return None if found is None else found[0].rank


def check_rank(method: str, models: Sequence[Tensor], base: Tensor, name: str) -> None:
    """Raises InputError where a task vector's matrix has the rank of a LoRA."""
    for number, model in enumerate(models, start=1):
        rank = numerical_rank(model, base)
        if rank and rank * LOW <= min(base.shape):
            raise InputError(
                f"{method}: in {name!r} model {number} differs from the base by rank {rank} of {min(base.shape)}, as a "
                "LoRA does: making all directions equally strong would drown it in noise. Use tsv_m or "
                "task_arithmetic, or set force: true"
            )


def _square(tensor: Tensor) -> float:
    return sum(total(tensor.reshape(-1)[part].square()) for part in parts(tensor.numel()))


def _narrow(tensor: Tensor) -> Tensor:
    """The same values in the shortest float dtype that holds them all."""
    for dtype in (torch.bfloat16, torch.float16):
        short = tensor.to(dtype)
        if torch.equal(short.to(tensor.dtype), tensor):
            return short
    return tensor
