"""Random layer stacking of real models: their layers are counted from tensor names, and the recipe is written."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from model_fusion.architecture.roles import main_stack
from model_fusion.checkpoint.reader import open_model
from model_fusion.checkpoint.sources import resolve
from model_fusion.errors import InputError
from model_fusion.recipe.random_stack import random_stack


def write_random_stack(
    models: Sequence[str],
    output: Path,
    *,
    layers: int | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    anywhere: bool = False,
) -> None:
    """Write `random_stack` of the models to `output`. Raises `InputError` for a model without layers, and where the
    file exists."""
    if output.exists():
        raise InputError(f"{output} already exists: choose another name")
    lengths = []
    for name in models:
        found = main_stack(open_model(resolve(name)).names)
        if found is None:
            raise InputError(f"{name} has no layers to stack")
        lengths.append((name, found[1]))
    recipe = random_stack(lengths, layers=layers, weights=weights, seed=seed, anywhere=anywhere)
    output.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
