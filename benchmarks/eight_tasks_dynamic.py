"""Rows of `eight_tasks.py` that run or store more than one network: Twin-Merging, masks, the ensemble of outputs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from eight_tasks_data import Setting, accuracy, network, stored
from eight_tasks_rows import Result, row
from model_fusion.dynamic.parts import exclusive
from model_fusion.dynamic.router import Labelled, Routed, measure, train_router
from model_fusion.dynamic.twin import TwinModel
from model_fusion.merge.methods import merge_state_dicts
from model_fusion.training.loop import TrainSettings

LAMBDAS = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
TEMPERATURES = [1.0, 1.5, 2.0]
ROUTER = TrainSettings(steps=600, batch_size=128, learning_rate=2e-3, weight_decay=0.01, validate_every=25, patience=0)


def labelled(setting: Setting, model: torch.nn.Module, split: str) -> Labelled:
    """The shared network's features of every task's images, with the task's number."""
    with torch.no_grad():
        features = [model(getattr(task, split).x) for task in setting.tasks]
    labels = [torch.full((len(rows),), i) for i, rows in enumerate(features)]
    return Labelled(torch.cat(features), torch.cat(labels))


def route(setting: Setting, model: torch.nn.Module) -> Routed:
    """A router trained on the training images, its step chosen on the validation images."""
    return train_router(
        labelled(setting, model, "train"),
        labelled(setting, model, "validation"),
        len(setting.tasks),
        settings=TrainSettings(**{**ROUTER.__dict__, "seed": setting.seed}),
        progress=False,
    )


@torch.no_grad()
def judged(setting: Setting, twin: TwinModel, split: str) -> list[float]:
    """Each task's accuracy, all its images in one batch, each with its own weights."""
    parts = [getattr(task, split) for task in setting.tasks]
    return [accuracy(twin(part.x), head, part.y) for part, head in zip(parts, setting.heads, strict=True)]


def softened(twin: TwinModel, temperature: float) -> TwinModel:
    """The same twin, whose router mixes more evenly."""
    made = copy.deepcopy(twin)
    made.router.soften(temperature)
    return made


def twin_row(fraction: float, method: str = "task_arithmetic", scales: Sequence[float] = LAMBDAS) -> None:
    """Twin on a shared network merged by `method`; its factor and the router's temperature are chosen on validation."""
    on = "" if method == "task_arithmetic" else f" on {method}"

    @row(f"twin rank {fraction:g}{on}", "dynamic")
    def run(setting: Setting) -> Result:
        best: tuple[float, dict[str, float], TwinModel, Routed] | None = None
        for scale in scales:
            state = merge_state_dicts(method, setting.experts, setting.base, lambda_=scale)
            shared = network(state)
            routed = route(setting, shared)
            plain = TwinModel(shared, exclusive(state, setting.experts, fraction), routed.router)
            for temperature in TEMPERATURES:
                twin = softened(plain, temperature)
                mean = fmean(judged(setting, twin, "validation"))
                if best is None or mean > best[0]:
                    best = (mean, {"lambda_": scale, "temperature": temperature}, twin, routed)
        assert best is not None
        mean, chosen, twin, routed = best
        right = measure(routed.router, labelled(setting, twin.shared, "test")).score
        size = twin.bytes()
        notes = {"router %": 100 * right, **{f"{k} kB": v / 1000 for k, v in size.items()}}
        return Result(judged(setting, twin, "test"), sum(size.values()), chosen, mean, notes)


twin_row(0.1)
twin_row(0.25)
twin_row(0.1, "tsv_m", [0.3, 0.5, 0.7])


@row("output averaging", "dynamic")
def _ensemble(setting: Setting) -> Result:
    """Mean of the experts' probabilities, each through the task's head."""
    models = [network(state) for state in setting.experts]

    @torch.no_grad()
    def averaged(x: Tensor, head: torch.nn.Module) -> Tensor:
        return torch.stack([head(model(x)).softmax(-1) for model in models]).mean(0)

    found = [
        float((averaged(task.test.x, head).argmax(-1) == task.test.y).double().mean())
        for task, head in zip(setting.tasks, setting.heads, strict=True)
    ]
    return Result(found, sum(stored(state) for state in setting.experts))
