"""Blackjack experts: each learned from played hands, and knows nothing of the solver that scores it.

`grid` and `picture` are CNNs (on a grid of states, and on the table as Gymnasium renders it), `forest` and
`boosting` are scikit-learn's. `solved` is the exception: distilled from exact values, it only checks that a
fusion loses nothing. `untrained` and the fixed policies serve the controls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from model_fusion.errors import MissingDependencyError
from model_fusion.evaluate.blackjack import State, action_values, states
from model_fusion.evaluate.hands import index, play
from model_fusion.fuse.experts import Expert, Field, InputSchema

CLASSES = ("stick", "hit")
SCHEMA = InputSchema((Field("sum", "int", 4, 21), Field("dealer", "int", 1, 10), Field("usable_ace", "bool")))
HANDS = 1_000_000
TEMPERATURE = 0.05
"""Action values become log-probabilities through a softmax at this temperature: decisive, yet graded near a tie."""

Floats = NDArray[np.float64]


class Played:
    """What `HANDS` played hands say of the 280 states: how often each action was played in each, and the mean of
    reward plus the value of the next state, for any estimate of values."""

    def __init__(self, seed: int) -> None:
        hands = play(HANDS, np.random.default_rng(seed))
        row = np.full(2 * 22 * 11, -1)
        row[[int(index(np.array(s), np.array(d), np.array(u))) for s, d, u in states()]] = np.arange(280)
        self.cell = row[hands.state()] * 2 + hands.action
        self.counts: Floats = np.bincount(self.cell, minlength=560).reshape(280, 2).astype(np.float64)
        self.ended, self.reward = hands.ended, hands.reward
        self.following = np.where(hands.ended, 0, row[hands.next_state()])

    def targets(self, values: Floats) -> Floats:
        """Mean of r + V(next) for each state and action [280, 2], with V = `values` [280]."""
        gain = self.reward + np.where(self.ended, 0.0, values[self.following])
        total = np.bincount(self.cell, weights=gain, minlength=560).reshape(280, 2)
        return np.asarray(total / np.maximum(self.counts, 1), dtype=np.float64)

    def weights(self) -> Floats:
        """How precisely the hands tell each cell, [280, 2], of mean about one."""
        return np.asarray(np.sqrt(self.counts / self.counts.mean()), dtype=np.float64)


def fit_net(net: nn.Module, inputs: Tensor, played: Played, *, seed: int, sweeps: int = 5) -> nn.Module:
    """Fitted Q iteration: each sweep fits the net to the hands' targets under the values of the sweep before.

    inputs: float32 [K, 280, ...], K views of each state; net: [B, ...] -> the values of sticking and hitting [B, 2].
    """
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    weight = torch.tensor(played.weights(), dtype=torch.float32)
    best = np.zeros(280)
    for sweep in range(sweeps):
        target = torch.tensor(played.targets(best), dtype=torch.float32)
        steps = 300 if sweep == sweeps - 1 else 80
        for step in range(steps):
            if sweep == sweeps - 1:
                optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps))
            view = torch.randint(len(inputs), (100,), generator=rng)
            state = torch.randint(280, (100,), generator=rng)
            loss = (weight[state] * (net(inputs[view, state]) - target[state]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            values = net(inputs.flatten(0, 1)).view(len(inputs), 280, 2).mean(dim=0)
            best = values.max(dim=1).values.double().numpy()
    return net.eval()


class Decisive(nn.Module):
    """Action values as logits: value / TEMPERATURE."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) / TEMPERATURE
        return out


# ---- the state as a grid ---------------------------------------------------------------------------------------


class GridNet(nn.Module):
    """A small CNN from a picture of the state, float32 [B, 2, 22, 11] (one plane for each kind of hand, one bright
    pixel at sum and dealer's card), to the values of sticking and hitting [B, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Sequential(nn.Linear(8 * 22 * 11, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, grid: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(grid))
        return out


def grid(items: Sequence[State]) -> Tensor:
    """States as pictures, float32 [B, 2, 22, 11]."""
    picture = torch.zeros(len(items), 2, 22, 11)
    for row, (total, dealer, usable) in enumerate(items):
        picture[row, int(usable), total, dealer] = 1.0
    return picture


def grid_expert(seed: int = 0) -> Expert:
    """The CNN on the state grid."""
    torch.manual_seed(seed)
    net = fit_net(GridNet(), grid(states())[None], Played(seed), seed=seed)
    return Expert.from_torch(Decisive(net).eval(), SCHEMA, preprocess=grid, classes=CLASSES)


def untrained_expert(seed: int = 0) -> Expert:
    """The same CNN, never trained (control 5)."""
    torch.manual_seed(seed)
    return Expert.from_torch(Decisive(GridNet()).eval(), SCHEMA, preprocess=grid, classes=CLASSES)


# ---- the rendered table ----------------------------------------------------------------------------------------


class PictureNet(nn.Module):
    """A small CNN from the rendered table, float32 [B, 1, 47, 48], to the values of sticking and hitting [B, 2].
    Each pixel is standardised over the training pictures [N, 1, 47, 48]: most of a table never changes."""

    def __init__(self, training: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", training.mean(dim=0))
        self.register_buffer("scale", training.std(dim=0) + 0.02)
        self.mean: Tensor
        self.scale: Tensor
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 12 * 12, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, picture: Tensor) -> Tensor:
        out: Tensor = self.head(self.features((picture - self.mean) / self.scale))
        return out


class Tables:
    """States as Gymnasium renders them (`render_mode="rgb_array"`), the dealer's suit and face drawn by `seed`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.known: dict[State, Tensor] = {}

    def __call__(self, items: Sequence[State]) -> Tensor:
        """Float32 [B, 1, 47, 48]: grey, averaged over 8 x 8 pixels."""
        for item in items:
            if item not in self.known:
                self.known[item] = self._shrunk(render(item, np.random.default_rng([self.seed, *map(int, item)])))
        return torch.stack([self.known[item] for item in items])

    @staticmethod
    def _shrunk(picture: NDArray[np.uint8]) -> Tensor:
        grey = torch.from_numpy(picture.astype(np.float32)).mean(dim=2)[None] / 255
        return nn.functional.avg_pool2d(grey, 8)


@cache
def _environment() -> Any:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame must not look for a screen
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        import gymnasium
    except ImportError:
        raise MissingDependencyError("the rendered table needs gymnasium: pip install 'model-fusion[tasks]'") from None
    env = gymnasium.make("Blackjack-v1", render_mode="rgb_array")
    env.reset(seed=0)
    return env


def render(state: State, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Gymnasium's picture of the table, uint8 [376, 384, 3], for a state as if it had been dealt."""
    total, dealer, usable = state
    env = _environment()
    inner = env.unwrapped
    inner.player = [1, total - 11] if usable else [total - 10, 10] if total > 11 else [2, total - 2]
    inner.dealer = [dealer, 10]
    inner.dealer_top_card_suit = rng.choice(["C", "D", "H", "S"])
    inner.dealer_top_card_value_str = (
        "A" if dealer == 1 else str(rng.choice(["J", "Q", "K"]) if dealer == 10 else dealer)
    )
    picture: NDArray[np.uint8] = env.render()
    return picture


def picture_expert(seed: int = 0) -> Expert:
    """The CNN on rendered tables. Suits and faces of the pictures it is used on are drawn afresh."""
    torch.manual_seed(seed)
    views = torch.stack([Tables(3 * seed + number)(states()) for number in range(3)])
    net = fit_net(PictureNet(views.flatten(0, 1)), views, Played(seed), seed=seed)
    return Expert.from_torch(Decisive(net).eval(), SCHEMA, preprocess=Tables(1_000_000 + seed), classes=CLASSES)


# ---- classic machine learning ----------------------------------------------------------------------------------


def forest_expert(seed: int = 0) -> Expert:
    """A random forest that classifies states by the action that did better in the played hands."""
    from sklearn.ensemble import RandomForestClassifier

    model = RandomForestClassifier(100, random_state=seed)
    return _classifier(model, seed)


def boosting_expert(seed: int = 0) -> Expert:
    """Gradient boosting on the same hands."""
    from sklearn.ensemble import GradientBoostingClassifier

    return _classifier(GradientBoostingClassifier(n_estimators=100, max_depth=4, random_state=seed), seed)


def _classifier(model: Any, seed: int) -> Expert:
    played, values = Played(seed), np.zeros(280)
    for _ in range(12):  # a hand rarely takes more cards
        table = played.targets(values)
        values = table.max(axis=1)
    better = table.argmax(axis=1)
    # A wrong call costs the gap between both actions; a rarely played state tells it less precisely.
    weight = np.abs(table[:, 1] - table[:, 0]) * played.weights().min(axis=1)
    model.fit(np.array(states(), dtype=np.float64), np.array(CLASSES)[better], sample_weight=weight)
    return Expert.from_sklearn(model, SCHEMA)


# ---- what the sanity check and the controls need ---------------------------------------------------------------


def solved_expert(seed: int = 0) -> Expert:
    """The grid CNN distilled from exact action values: a sanity check, no evidence of learning."""
    torch.manual_seed(seed)
    net, inputs, target = GridNet(), grid(states()), torch.tensor([action_values(s) for s in states()])
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        loss = ((net(inputs) - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Expert.from_torch(Decisive(net.eval()).eval(), SCHEMA, preprocess=grid, classes=CLASSES)


EXPERTS: Mapping[str, Callable[[int], Expert]] = {
    "grid": grid_expert,
    "picture": picture_expert,
    "forest": forest_expert,
    "boosting": boosting_expert,
    "solved": solved_expert,
    "untrained": untrained_expert,
}
