"""Recipes that stack layers at random, to search for a good order: the same seed draws the same recipe."""

import random
from collections.abc import Sequence
from typing import Any

from model_fusion.errors import InputError


def random_stack(
    models: Sequence[tuple[str, int]],
    *,
    layers: int | None = None,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    anywhere: bool = False,
) -> dict[str, Any]:
    """A passthrough recipe of `layers` output layers (as many as the first model has, unless given).

    **Arguments**
    models: (name, number of layers) of each. weights: how often each model is drawn; equal without them.
    anywhere: any layer may come to any place; otherwise a layer keeps its relative depth.
    **Raises** InputError where a number makes no sense.
    """
    if not models:
        raise InputError("random stacking needs at least one model")
    count = models[0][1] if layers is None else layers
    if count < 1:
        raise InputError(f"layers {count}: give at least 1")
    if weights is not None and (len(weights) != len(models) or min(weights) < 0 or sum(weights) == 0):
        raise InputError(f"weights {list(weights)}: give one number of at least 0 for each of {len(models)} models")
    draw = random.Random(seed)
    slices: list[dict[str, Any]] = []
    for place in range(count):
        name, length = draw.choices(models, weights)[0]
        layer = draw.randrange(length) if anywhere else place * length // count
        before = slices[-1] if slices else None
        if before is not None and before["model"] == name and before["layer_range"][1] == layer:
            before["layer_range"][1] += 1
        else:
            slices.append({"model": name, "layer_range": [layer, layer + 1]})
    return {"merge_method": "passthrough", "slices": [{"sources": [source]} for source in slices], "seed": seed}
