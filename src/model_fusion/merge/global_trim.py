"""`trim: global` in a merge of checkpoints: one cut a model over all its tensors, found before one is merged."""

from collections.abc import Callable

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.methods.selection import Cut
from model_fusion.merge.methods.state_dicts import cuts_together
from model_fusion.merge.ordered import ordered
from model_fusion.merge.plan import MergePlan, Output

Place = tuple[Output, int]
"""An output, and which of its inputs is meant."""


def trimmed_together(work: MergePlan) -> dict[str, list[Place]]:
    """Model → its tensors whose parameters say `trim: global`, in the order of the output."""
    found: dict[str, list[Place]] = {}
    for item in work.outputs:
        if getattr(item.params, "trim", "tensor") == "global":
            for i, source in enumerate(item.inputs):
                found.setdefault(source.model, []).append((item, i))
    return found


def find_cuts(work: MergePlan, threads: int) -> dict[str, list[Cut]]:
    """Output → one cut an input; empty where each tensor is trimmed by itself. Reads every tensor a few times.

    Raises `InputError` where a model's density is not the same for all tensors."""
    models = trimmed_together(work)
    found: dict[str, list[Cut | None]] = {}
    for places, cuts in zip(models.values(), ordered(lambda p: _cuts(work, p), models.values(), threads), strict=True):
        for (item, i), cut in zip(places, cuts, strict=True):
            found.setdefault(item.spec.name, [None] * len(item.inputs))[i] = cut
    return {name: [cut for cut in cuts if cut is not None] for name, cuts in found.items()}


def _cuts(work: MergePlan, places: list[Place]) -> list[Cut]:
    densities = {item.model_params[i].density for item, i in places}
    if len(densities) > 1:
        model = places[0][0].inputs[places[0][1]].model
        raise InputError(f"trim: global cuts all tensors of {model} at once: give it one density, not {len(densities)}")
    sizes = [torch.Size(item.spec.shape).numel() for item, _ in places]
    return cuts_together(sizes, _latest(work, places), densities.pop())


def _latest(work: MergePlan, places: list[Place]) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Number → (model, base) of that place. Only the one read last is kept: an adapter's or a union's are made anew."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def read(number: int) -> tuple[Tensor, Tensor]:
        if number not in kept:
            kept.clear()
            item, i = places[number]
            assert item.base is not None
            model, base = (work.checkpoints[s.model].read(s.tensor) for s in (item.inputs[i], item.base))
            kept[number] = (model, base)
        return kept[number]

    return read
