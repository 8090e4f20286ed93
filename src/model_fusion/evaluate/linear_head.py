"""A linear head on an expert's features: what the expert can do with the same labels and no LLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model_fusion.fuse.bridges.base import flat
from model_fusion.fuse.experts.base import Features
from model_fusion.fuse.normalise import Normaliser

DECAY = 1e-3


def linear_head(features: Features, answers: Sequence[str] | Sequence[float]) -> Callable[[Features], list[str]]:
    """Fit on features [B, T, D] and B answers: multinomial logistic regression over distinct texts, least squares
    for numbers, both with an L2 penalty of `DECAY`. Returns features -> answers as text."""
    normaliser = Normaliser(features.values.shape[-1])
    normaliser.fit(features)

    def inputs(given: Features) -> Tensor:
        x = flat(normaliser(given.values), given.mask).double()
        return torch.cat([x, torch.ones(len(x), 1, dtype=torch.double)], dim=1)

    x = inputs(features)
    if all(isinstance(answer, float) for answer in answers):
        y = torch.tensor([float(answer) for answer in answers], dtype=torch.double)
        weight = torch.linalg.solve(x.T @ x + DECAY * torch.eye(x.shape[1], dtype=torch.double), x.T @ y)
        return lambda given: [f"{value:.6f}" for value in (inputs(given) @ weight).tolist()]
    classes = sorted({str(answer) for answer in answers})
    labels = torch.tensor([classes.index(str(answer)) for answer in answers])
    table = _logistic(x, labels, len(classes))
    return lambda given: [classes[i] for i in (inputs(given) @ table).argmax(dim=1).tolist()]


def _logistic(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Weights [D, classes] of least cross-entropy; the problem is convex, so there is one answer."""
    weight = torch.zeros(x.shape[1], classes, dtype=torch.double, requires_grad=True)
    optimizer: Any = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight, labels) + DECAY * weight.pow(2).mean()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    return weight.detach()
