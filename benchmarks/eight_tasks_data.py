"""Eight tasks made of scikit-learn's digits, one small pre-trained network, and an expert for each task.

A task shows the same 8×8 images in its own way (turned, mirrored, inverted, pixels permuted) and asks for the digit.
The network 64-128-128-64 is trained on all tasks together for 12 steps of Adam, with one linear head a task. The heads
are frozen then, and each expert fine-tunes the network on its own task for 300 steps of SGD. An image is in the same
split for all tasks, so that no task's training shows another's test. The weights start as He et al. 2015 have it for
ReLU: from torch's smaller default, experts learn as well, but every merge of them is several points worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (64, 128, 128, 64)
JOINT_STEPS, TUNING_STEPS = 12, 300
JOINT_RATE, TUNING_RATE, MOMENTUM = 3.5e-3, 0.03, 0.9
BATCH = 64
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Split:
    """x: float32 [N, 64] in [0, 1]; y: int64 [N], the digits."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Task:
    """One way to show the digits."""

    name: str
    train: Split
    validation: Split
    test: Split


class Network(nn.Module):
    """64-128-128-64 with ReLU between: float32 [N, 64] images to [N, 64] features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(WIDTHS))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


@dataclass(frozen=True)
class Setting:
    """All that a row may use. heads: one frozen linear layer a task, [10, 64]; base, experts: the network's states."""

    seed: int
    tasks: list[Task]
    base: dict[str, Tensor]
    experts: list[dict[str, Tensor]]
    heads: list[nn.Linear]


def network(state: State) -> Network:
    """The network with these weights."""
    made = Network()
    made.load_state_dict(dict(state))
    return made


def stored(state: State) -> int:
    """Bytes of its tensors."""
    return sum(t.nbytes for t in state.values())


def accuracy(features: Tensor, head: nn.Linear, y: Tensor) -> float:
    """Share of right digits."""
    return float((head(features).argmax(-1) == y).double().mean())


@torch.no_grad()
def accuracies(setting: Setting, state: State, split: str) -> list[float]:
    """One network's accuracy on each task's `split` (validation or test), in the tasks' order."""
    model = network(state)
    found = []
    for task, head in zip(setting.tasks, setting.heads, strict=True):
        part: Split = getattr(task, split)
        found.append(accuracy(model(part.x), head, part.y))
    return found


def make_tasks(seed: int) -> list[Task]:
    """The eight tasks; the split and the two permutations depend on the seed."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 16.0
    labels = torch.from_numpy(digits.target).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    permuted = [torch.randperm(64, generator=generator) for _ in range(2)]
    views = {
        "identity": images,
        **{f"rotated by {90 * k}": torch.rot90(images, k, (1, 2)) for k in (1, 2, 3)},
        "mirrored": images.flip(2),
        "inverted": 1.0 - images,
        **{f"permutation {i + 1}": images.flatten(1)[:, p] for i, p in enumerate(permuted)},
    }
    first, second = int(SHARES["train"] * len(labels)), int((1 - SHARES["test"]) * len(labels))
    parts = [order[:first], order[first:second], order[second:]]
    return [Task(name, *(Split(view.flatten(1)[p], labels[p]) for p in parts)) for name, view in views.items()]


def batches(size: int, steps: int, generator: torch.Generator) -> Tensor:
    """int64 [steps, BATCH]: rows of each step, drawn with replacement."""
    return torch.randint(size, (steps, BATCH), generator=generator)


def train_base(tasks: list[Task], seed: int) -> tuple[Network, list[nn.Linear]]:
    """The network and heads after the joint steps; each step sees a batch of every task."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, heads = Network(), [nn.Linear(WIDTHS[-1], 10) for _ in tasks]
    generator = torch.Generator().manual_seed(seed)
    drawn = [batches(len(task.train.y), JOINT_STEPS, generator) for task in tasks]
    optimiser = torch.optim.Adam([*model.parameters(), *(p for h in heads for p in h.parameters())], lr=JOINT_RATE)
    for step in range(JOINT_STEPS):
        loss = torch.stack(
            [
                F.cross_entropy(head(model(task.train.x[rows[step]])), task.train.y[rows[step]])
                for task, head, rows in zip(tasks, heads, drawn, strict=True)
            ]
        ).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for head in heads:
        head.requires_grad_(False)
    return model, heads


def train_expert(base: State, head: nn.Linear, task: Task, seed: int) -> dict[str, Tensor]:
    """The network after fine-tuning on one task under its frozen head."""
    model = network(base)
    rows = batches(len(task.train.y), TUNING_STEPS, torch.Generator().manual_seed(seed))
    optimiser = torch.optim.SGD(model.parameters(), lr=TUNING_RATE, momentum=MOMENTUM)
    for step in range(TUNING_STEPS):
        loss = F.cross_entropy(head(model(task.train.x[rows[step]])), task.train.y[rows[step]])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return weights(model)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of its state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def make_setting(seed: int) -> Setting:
    """Tasks, base and experts of one seed."""
    tasks = make_tasks(seed)
    model, heads = train_base(tasks, seed)
    base = weights(model)
    experts = [
        train_expert(base, head, task, 1000 * seed + i) for i, (task, head) in enumerate(zip(tasks, heads, strict=True))
    ]
    return Setting(seed, tasks, base, experts, heads)
