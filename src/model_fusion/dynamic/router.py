"""Which expert an input belongs to: a small network on the shared model's features, trained on the task's id."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from model_fusion.errors import InputError
from model_fusion.training.loop import History, Measure, TrainSettings, train

SETTINGS = TrainSettings(
    steps=400, batch_size=64, learning_rate=1e-3, weight_decay=0.01, validate_every=20, patience=10
)


class Router(nn.Module):
    """float32 [B, d] features to [B, T] logits: (Linear, BatchNorm, LeakyReLU, Dropout) twice, then Linear; 2d wide."""

    def __init__(self, width: int, experts: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.width, self.experts = width, experts
        layers: list[nn.Module] = []
        for inner in (width, 2 * width):
            layers += [nn.Linear(inner, 2 * width), nn.BatchNorm1d(2 * width), nn.LeakyReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(2 * width, experts))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features)
        return logits

    @torch.no_grad()
    def soften(self, temperature: float) -> None:
        """Divide the logits by `temperature`, for good: above 1 mixes experts more evenly. No choice changes."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        last.weight.div_(temperature)
        last.bias.div_(temperature)

    @torch.no_grad()
    def settle(self, features: Tensor) -> None:
        """Set BatchNorm's running statistics to those of `features` [N, d], layer by layer, and go to eval mode."""
        self.eval()
        x = features
        for layer in self.layers:
            if isinstance(layer, nn.BatchNorm1d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.copy_(x.mean(0))
                layer.running_var.copy_(x.var(0, unbiased=False))
            x = layer(x)


@dataclass(frozen=True)
class Labelled:
    """features float32 [N, d]; labels int64 [N], the expert's number."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Routed:
    """A trained router; its share of right choices on the validation rows, by which its step was chosen."""

    router: Router
    validation: float
    history: History


class _Objective(nn.Module):
    """Cross-entropy on the task's id, over rows of the training features."""

    def __init__(self, router: Router, data: Labelled) -> None:
        super().__init__()
        self.router, self.data = router, data

    def forward(self, indices: Tensor) -> Tensor:
        self.router.train()
        return cross_entropy(self.router(self.data.features[indices]), self.data.labels[indices])


def train_router(
    training: Labelled,
    validation: Labelled,
    experts: int,
    *,
    settings: TrainSettings = SETTINGS,
    dropout: float = 0.2,
    progress: bool = True,
) -> Routed:
    """Train on `training`; the step is chosen on `validation` (published scripts choose it on test data).

    BatchNorm's statistics are those of all training features, set anew at every validation, so what was measured is
    what is kept. Raises InputError where an expert has no rows.
    """
    for what, data in (("training", training), ("validation", validation)):
        missing = sorted(set(range(experts)) - set(data.labels.tolist()))
        if missing:
            raise InputError(f"the router has no {what} rows of expert {missing[0]}: give more text")
    rows = len(training.labels)
    batch = min(settings.batch_size, rows)
    if batch < 2:
        raise InputError(f"BatchNorm needs batches of at least 2 rows, got batch_size {batch}")
    rows -= rows % batch == 1  # a last batch of one row has no statistics: that row is left out
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        router = Router(training.features.shape[1], experts, dropout)

        def validate() -> Measure:
            router.settle(training.features)
            return measure(router, validation)

        objective = _Objective(router, training)
        history = train(objective, list(router.parameters()), rows, validate, settings, progress=progress)
        router.settle(training.features)
    return Routed(router.requires_grad_(False), measure(router, validation).score, history)


@torch.no_grad()
def measure(router: Router, data: Labelled) -> Measure:
    """Mean cross-entropy and share of right choices."""
    logits = router(data.features)
    right = (logits.argmax(-1) == data.labels).double().mean()
    return Measure(float(cross_entropy(logits, data.labels)), float(right))
