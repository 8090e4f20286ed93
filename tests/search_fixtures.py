"""A merge whose best weights are known: two task vectors that touch different entries, and a target between them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

BEST = (0.7, 0.2)
RECIPE: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base.safetensors",
    "models": [
        {"model": "a.safetensors", "parameters": {"weight": {"range": [0, 1], "name": "wa"}}},
        {"model": "b.safetensors", "parameters": {"weight": {"range": [0, 1], "name": "wb"}}},
    ],
}
YAML = """
merge_method: task_arithmetic
base_model: base.safetensors
models:
  - model: a.safetensors
    parameters: {weight: {range: [0, 1], name: wa}}
  - model: b.safetensors
    parameters: {weight: {range: [0, 1], name: wb}}
"""


def write(folder: Path) -> Path:
    """base, a and b as bare state dicts, and the recipe; returns the recipe's file."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(4, 4, generator=generator), "b": torch.randn(4, generator=generator)}
    one, two = torch.zeros(4, 4), torch.zeros(4, 4)
    one[:2], two[2:] = 1.0, 1.0
    save_file(base, folder / "base.safetensors")
    save_file({**base, "w": base["w"] + one}, folder / "a.safetensors")
    save_file({**base, "w": base["w"] + two}, folder / "b.safetensors")
    (folder / "recipe.yml").write_text(YAML)
    return folder / "recipe.yml"


def closeness(merged: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> float:
    """−|weights − BEST|²; `data` holds the base's `w` (and whatever a test wants to recognise it by)."""
    change = merged["w"] - data["w"]
    return -float((change[0, 0] - BEST[0]) ** 2 + (change[3, 3] - BEST[1]) ** 2)
