"""AdaMerging equals autograd through the whole sum of models, and its coefficients reach their tensors."""

import pytest
import torch
from torch import Tensor, nn

import model_fusion as mf
from calibration_fixtures import Batches, mlp, vectors
from model_fusion.merge.calibration import entropy

Patch = pytest.MonkeyPatch


def naive_adamerging(base: nn.Module, models: list[nn.Module], data: list[Batches], steps: int) -> Tensor:
    """torch.func.functional_call and autograd through the whole sum, float64."""
    start = {name: p.detach() for name, p in base.named_parameters()}
    tasks = [{n: p.detach() - start[n] for n, p in m.named_parameters()} for m in models]
    raw = torch.full((len(models), len(start)), 0.3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([raw], lr=0.05)
    for step in range(steps):
        shares = raw.clamp(0, 1)
        merged = {
            n: t + sum(shares[k, i] * task[n] for k, task in enumerate(tasks)) for i, (n, t) in enumerate(start.items())
        }
        loss = torch.zeros((), dtype=torch.float64)
        for batches in data:
            logits = torch.func.functional_call(base, merged, (batches[step % len(batches)],))
            loss = loss + torch.distributions.Categorical(logits=logits).entropy().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return raw.detach().clamp(0, 1)


def adamerging_agrees() -> bool:
    base, *models = (mlp(seed, torch.float64) for seed in range(4))
    data = [vectors(seed, torch.float64) for seed in range(3)]
    found = mf.adamerging(base, models, data, steps=20, learning_rate=0.05)
    want = naive_adamerging(base, models, data, 20)
    got = torch.tensor([list(one.values()) for one in found.weights], dtype=torch.float64)
    assert want.min() == 0  # the bound was met
    assert want.max() > 0.5
    assert found.entropy[-1] < found.entropy[0]
    return torch.allclose(got, want, rtol=0, atol=1e-5)


def test_adamerging_equals_autograd_through_the_sum() -> None:
    assert adamerging_agrees()


def test_the_adamerging_check_goes_red(monkeypatch: Patch) -> None:
    real = entropy._slopes
    monkeypatch.setattr(entropy, "_slopes", lambda weights, tasks: real(weights, tasks).roll(1, 0))
    assert not adamerging_agrees()


class Deep(nn.Module):
    """Names that are parts of other names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(12))
        self.inner = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)])})
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *self.inner["layers"]):
            x = x + layer(x)
        return self.norm(x)


def test_coefficients_reach_their_own_tensors() -> None:
    base, *models = (Deep(seed) for seed in range(3))
    found = mf.adamerging(base, models, [[torch.randn(4, 3)]], steps=3, learning_rate=0.1)
    states = [m.state_dict() for m in models]
    merged = mf.merge_state_dicts("task_arithmetic", states, base.state_dict(), found.parameters())
    assert len({round(v, 9) for v in found.weights[0].values()}) > 3
    for name, tensor in base.state_dict().items():
        if tensor.is_floating_point():
            values = [one.get(name, 0.3) for one in found.weights]
            want = tensor + sum(v * (s[name] - tensor) for v, s in zip(values, states, strict=True))
            assert torch.allclose(merged[name], want, atol=1e-6), name
