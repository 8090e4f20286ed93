"""RegMean++: statistics that see the merged layers before them; each check has been seen to fail."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import model_fusion as mf
from calibration_fixtures import Batches, llama, mlp, tokens, vectors
from model_fusion.merge.calibration import propagate, replay

Patch = pytest.MonkeyPatch


def naive_regmean_plus(models: list[nn.Module], data: list[Tensor], alpha: float) -> list[np.ndarray]:
    """Layer by layer with the outputs of the merged layers before, float64, as in the paper's Algorithm 1."""
    hidden = [x.double().numpy() for x in data]
    found = []
    for name in ("0", "2", "4"):
        weights = [m.get_submodule(name).weight.detach().double().numpy() for m in models]
        bias = np.mean([m.get_submodule(name).bias.detach().double().numpy() for m in models], axis=0)
        grams = [h.T @ h / len(h) for h in hidden]
        grams = [alpha * g + (1 - alpha) * np.diag(np.diag(g)) for g in grams]
        ridge = np.diag(1e-6 * np.diag(sum(grams)))
        right = sum(w @ g for w, g in zip(weights, grams, strict=True)) + np.mean(weights, axis=0) @ ridge
        merged = right @ np.linalg.inv(sum(grams) + ridge)
        found.append(merged)
        hidden = [np.tanh(h @ merged.T + bias) for h in hidden]
    return found


def regmean_plus_agrees(alpha: float = 0.8) -> bool:
    models, data = [mlp(seed) for seed in range(3)], [vectors(seed) for seed in range(3)]
    statistics = mf.collect_merged_statistics(models, data, alpha=alpha)
    merged = mf.merge_state_dicts("regmean", [m.state_dict() for m in models], statistics=statistics, alpha=alpha)
    want = naive_regmean_plus(models, [torch.cat(batches) for batches in data], alpha)
    got = [merged[name].double().numpy() for name in ("0.weight", "2.weight", "4.weight")]
    return all(np.allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()) for a, b in zip(got, want, strict=True))


def test_regmean_plus_equals_its_algorithm() -> None:
    assert regmean_plus_agrees()


def test_the_regmean_plus_check_goes_red_where_nothing_is_handed_on(monkeypatch: Patch) -> None:
    monkeypatch.setattr(propagate._Walk, "merge", lambda *a: None)
    assert not regmean_plus_agrees()


@contextmanager
def with_weights(module: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.load_state_dict(state)
    yield
    module.load_state_dict(before)


def without_cache(batches: Batches) -> Batches:
    return [{**batch, "use_cache": False} for batch in batches]


def layers_agree(data: list[Batches], monkeypatch: Patch) -> bool:
    """Layer ℓ's Gram matrices are those of a model whose layers before ℓ (and embedding) are the merged ones."""
    models = [llama(seed) for seed in (1, 2)]
    used: list[bool] = []
    real = replay.Replay.record
    monkeypatch.setattr(propagate.Replay, "record", lambda *a: used.append(found := real(*a)) or found)
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in models]
    found = mf.collect_merged_statistics(models, data, weights=[1.0, 0.5])
    each = [{"weight": 1.0}, {"weight": 0.5}]
    states = [m.state_dict() for m in models]
    merged = mf.merge_state_dicts("regmean", states, model_params=each, statistics=found)
    assert [one is not None for one in used] == ["use_cache" in data[0][0]]
    right = []
    for layer in range(3):
        done = ("model.embed", "lm_head", *(f"model.layers.{n}." for n in range(layer)))
        for model, batches, own in zip(models, data, found, strict=True):
            mixed = {n: (merged if n.startswith(done) else model.state_dict())[n] for n in merged}
            with with_weights(model, mixed):
                want = mf.collect_statistics(model, batches, only=[f"layers.{layer}."])
            assert len(want) == 7
            right += [torch.allclose(own[n], want[n], rtol=1e-4, atol=1e-5 * float(want[n].max())) for n in want]
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())
    return all(right)


@pytest.mark.parametrize("change", [list, without_cache])
def test_a_layer_is_measured_after_merged_layers(change: Callable[[Batches], Batches], monkeypatch: Patch) -> None:
    assert layers_agree([change(tokens(3)), change(tokens(2))], monkeypatch)


def test_the_layer_check_goes_red_where_a_replay_stands_still(monkeypatch: Patch) -> None:
    monkeypatch.setattr(propagate.Replay, "advance", lambda *a: None)
    assert not layers_agree([without_cache(tokens(3)), without_cache(tokens(2))], monkeypatch)


class Hands(nn.Module):
    """Layers that hand a second tensor on, which a replay would keep from before the merge."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Pair() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            x, y = layer(x, y)
        return x


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x) + y, self.two(y).tanh()


class Routed(nn.Module):
    """A layer one of whose parts runs on some batches only."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([Pair()])

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers[0].one if float(x.sum()) < 0 else self.layers[0].two)(x)


def test_parts_that_the_first_batch_did_not_reach_are_measured() -> None:
    batches = [-torch.ones(2, 6), torch.ones(2, 6)]
    found = mf.collect_merged_statistics([Routed(1), Routed(2)], [batches, batches])
    assert all(set(own) == {"layers.0.one.weight", "layers.0.two.weight"} for own in found)


def test_layers_that_hand_more_on_are_not_replayed() -> None:
    models, data = [Hands(seed) for seed in (1, 2)], [vectors(1), vectors(2)]
    found = mf.collect_merged_statistics(models, data)
    merged = mf.merge_state_dicts("regmean", [m.state_dict() for m in models], statistics=found)
    with with_weights(models[0], merged):
        want = mf.collect_statistics(models[0], data[0])
    assert torch.allclose(found[0]["layers.2.two.weight"], want["layers.2.two.weight"], rtol=1e-4, atol=1e-6)
