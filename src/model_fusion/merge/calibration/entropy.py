"""AdaMerging: how much of each task vector to take for each tensor, found without labels (Yang et al. 2024, ICLR).

The result is coefficients of plain task arithmetic, for `merge_state_dicts` or a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError
from model_fusion.merge.calibration.batches import (
    Forward,
    check_finite,
    evaluating,
    logits_of,
    mask_of,
    one_each,
)


@dataclass(frozen=True)
class Coefficients:
    """weights: for each model, tensor's name → λ. entropy: the summed mean entropies (nats) at each step. initial: λ
    of tensors that no step could change (buffers)."""

    weights: tuple[Mapping[str, float], ...]
    entropy: tuple[float, ...]
    initial: float

    def parameters(self) -> list[dict[str, Any]]:
        """`parameters` of each model for task_arithmetic, in a recipe or as `model_params`."""
        # a filter is a part of a name and the first that fits counts: longer names come first
        return [
            {
                "weight": [
                    *({"filter": name, "value": one[name]} for name in sorted(one, key=len, reverse=True)),
                    {"value": self.initial},
                ]
            }
            for one in self.weights
        ]

    def recipe(self, base: str, models: Sequence[str]) -> dict[str, Any]:
        """A merge recipe with these coefficients."""
        if len(models) != len(self.weights):
            raise InputError(f"coefficients of {len(self.weights)} models, {len(models)} names")
        entries = [{"model": n, "parameters": p} for n, p in zip(models, self.parameters(), strict=True)]
        return {"merge_method": "task_arithmetic", "base_model": base, "models": entries}


def adamerging(
    base: nn.Module,
    models: Sequence[nn.Module | Mapping[str, Tensor]],
    batches: Sequence[Sequence[Any]],
    *,
    forward: Forward | Sequence[Forward] | None = None,
    steps: int = 500,
    learning_rate: float = 1e-3,
    initial: float = 0.3,
    step: Callable[[int], object] = lambda total: None,
) -> Coefficients:
    """λ of every model and tensor that make base + Σ λτ surest of its answers: Adam on Σ over tasks of the mean
    entropy of its predictions, λ kept in [0, 1].

    **Arguments**
    models: fine-tunes of `base`, modules or their state dicts. batches: unlabelled inputs of each task; a step takes
        the next one of every task (`collect_statistics` says what they may be). forward: one for all tasks or one each.
    steps, learning_rate, initial: the paper's 500, 1e-3 and 0.3.
    step: called with the number of steps after each.

    Memory: the task vectors, one copy of the base and its gradient.

    **Raises** InputError where tensors do not fit, batches are missing, or entropy is NaN.
    """
    if not models or not batches or not all(batches):
        raise InputError("adamerging needs models, and batches of every task")
    forwards = one_each(forward, len(batches))
    merged = deepcopy(base)
    weights = {n: p for n, p in merged.named_parameters() if p.is_floating_point()}
    start = {name: p.detach().clone() for name, p in weights.items()}
    tasks = [_deltas(start, model, i) for i, model in enumerate(models)]
    raw = torch.full((len(models), len(weights)), initial, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([raw], lr=learning_rate)
    entropy = []
    for parameter in weights.values():
        parameter.requires_grad_(True)
    with evaluating(merged), torch.enable_grad():
        for number in range(steps):
            shares = raw.clamp(0.0, 1.0)
            _set(weights, start, tasks, shares.detach())
            value = 0.0
            for forward_one, task in zip(forwards, batches, strict=True):
                batch = task[number % len(task)]
                loss = _entropy(logits_of(forward_one(merged, batch)), mask_of(batch))
                loss.backward()  # type: ignore[no-untyped-call]
                value += float(loss.detach())
            check_finite(torch.tensor(value), "the entropy")
            entropy.append(value)
            optimiser.zero_grad()
            shares.backward(_slopes(weights, tasks))  # type: ignore[no-untyped-call]
            optimiser.step()
            merged.zero_grad()
            step(steps)
    final = raw.detach().clamp(0.0, 1.0)
    found = tuple({name: float(row[i]) for i, name in enumerate(weights)} for row in final)
    return Coefficients(found, tuple(entropy), initial)


def _deltas(start: Mapping[str, Tensor], model: nn.Module | Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """τ = model − base, tensor by tensor."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    found = {}
    for name, own in start.items():
        if name not in state or state[name].shape != own.shape:
            raise InputError(f"model {number}: no tensor {name!r} of shape {list(own.shape)}, which the base has")
        found[name] = state[name].detach().to(own) - own
        check_finite(found[name], f"model {number}: {name!r}")
    return found


@torch.no_grad()
def _set(
    weights: Mapping[str, nn.Parameter], start: Mapping[str, Tensor], tasks: list[dict[str, Tensor]], shares: Tensor
) -> None:
    """base + Σ λτ, in place."""
    for i, (name, parameter) in enumerate(weights.items()):
        parameter.copy_(start[name])
        for task, row in zip(tasks, shares, strict=True):
            parameter.add_(task[name], alpha=float(row[i]))


@torch.no_grad()
def _slopes(weights: Mapping[str, nn.Parameter], tasks: list[dict[str, Tensor]]) -> Tensor:
    """∂loss/∂λ = ⟨gradient, τ⟩: the chain rule by hand keeps no graph through the sum of models."""
    rows = []
    for task in tasks:
        grads = [(p.grad, task[n]) for n, p in weights.items()]
        rows.append([0.0 if g is None else float((g.double() * t.double()).sum()) for g, t in grads])
    return torch.tensor(rows, dtype=torch.float64)


def _entropy(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over predictions of −Σ p log p."""
    logs = logits.log_softmax(-1)
    each = -(logs.exp() * logs).sum(-1)
    if mask is not None and mask.shape == each.shape:
        each = each[mask.to(each.device)]
    return each.mean()
