"""Rows of `eight_tasks.py` with one task vector and a mask for each expert.

EMR and TALL are told the task of each image; no other row's network is (all rows read the answer through the task's
head).
"""

from __future__ import annotations

from statistics import fmean

import torch

from eight_tasks_data import Setting, State, accuracy, network, stored
from eight_tasks_rows import Result, row
from model_fusion.dynamic.masks import Masks, emr, tall

STRENGTHS = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5]


def named(setting: Setting) -> dict[str, State]:
    """The experts' states by task."""
    return {task.name: expert for task, expert in zip(setting.tasks, setting.experts, strict=True)}


@torch.no_grad()
def own_accuracies(setting: Setting, masks: Masks, split: str) -> list[float]:
    """Each task's accuracy under the network that its own mask brings back."""
    found = []
    for task, head in zip(setting.tasks, setting.heads, strict=True):
        part = getattr(task, split)
        found.append(accuracy(network(masks.reconstruct(setting.base, task.name))(part.x), head, part.y))
    return found


def kept(setting: Setting, masks: Masks) -> int:
    """Bytes of base, shared vector and masks."""
    return stored(setting.base) + sum(masks.nbytes.values())


@row("emr, task id given", "dynamic")
def _emr(setting: Setting) -> Result:
    masks = emr(setting.base, named(setting))
    return Result(own_accuracies(setting, masks, "test"), kept(setting, masks))


@row("tall, task id given", "dynamic")
def _tall(setting: Setting) -> Result:
    """One strength a task, as the paper has it, by its validation images."""
    tried = [own_accuracies(setting, tall(setting.base, named(setting), s), "validation") for s in STRENGTHS]
    best = [max(range(len(STRENGTHS)), key=lambda i: tried[i][task]) for task in range(len(setting.tasks))]
    chosen = [STRENGTHS[i] for i in best]
    masks = tall(setting.base, named(setting), chosen)
    validation = fmean(tried[i][task] for task, i in enumerate(best))
    return Result(
        own_accuracies(setting, masks, "test"), kept(setting, masks), {"mean strength": fmean(chosen)}, validation
    )
