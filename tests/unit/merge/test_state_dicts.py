"""Every method on plain modules: a CNN with BatchNorm and tied weights, odd shapes, several dtypes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import model_fusion as mf
from model_fusion.errors import InputError
from model_fusion.merge.methods import all_methods
from model_fusion.merge.methods.base import Method


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(16, 16, bias=False)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("mask", torch.tensor([True, False]))


def nets(count: int) -> list[Net]:
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        net = Net()
        net.norm.running_var.uniform_(0.5, 2)
        net.norm.num_batches_tracked += seed
        made.append(net)
    return made


def given(method: Method) -> dict[str, Any]:
    if method.name == "lines":  # the names of this module count no layers
        return {"depth": dict.fromkeys(Net().state_dict(), 0.5)}
    if method.needs_data is not None:
        own = {"fisher": torch.arange(256.0).view(16, 16), "gram": torch.eye(16)}[method.needs_data]
        return {"statistics": [{"first.weight": own}, {"first.weight": 2 * own}]}
    return {"t": 0.3} if method.name in ("slerp", "nearswap") else {}


@pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.name)
def test_every_method_merges_any_module(method: Method) -> None:
    count = 1 if method.name == "slerp" else max(method.min_models, min(2, method.max_models or 2))
    *models, base = [net.state_dict() for net in nets(count + 1)]
    before = {name: tensor.clone() for name, tensor in models[0].items()}
    own = None if method.needs_base == "forbidden" else base
    merged = mf.merge_state_dicts(method.name, models, own, seed=3, **given(method))
    assert all(torch.equal(models[0][name], tensor) for name, tensor in before.items())
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {
        n: (t.shape, t.dtype) for n, t in before.items()
    }
    assert all(bool(torch.isfinite(tensor).all()) for tensor in merged.values() if tensor.is_floating_point())
    assert torch.equal(merged["first.weight"], merged["tied.weight"])
    assert torch.equal(merged["norm.num_batches_tracked"], before["norm.num_batches_tracked"])
    net = Net()
    net.load_state_dict(merged, strict=True)
    assert torch.equal(net.first.weight, merged["first.weight"])
    again = mf.merge_state_dicts(method.name, models, own, seed=3, **given(method))
    assert all(torch.equal(merged[name], again[name]) for name in merged)


def mean(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    def one(name: str) -> Tensor:
        total = sum((w * s[name].double() for w, s in zip(weights, states, strict=True)), torch.zeros(()))
        return total / sum(weights)

    return {name: one(name) for name, tensor in states[0].items() if tensor.is_floating_point()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_is_the_mean_in_each_dtype(dtype: torch.dtype) -> None:
    states = [net.to(dtype).state_dict() for net in nets(2)]
    each = [{"weight": 0.25}, {"weight": 1}]
    merged = mf.merge_state_dicts("linear", states, model_params=each)
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-6

    def close(weights: list[float]) -> bool:
        expected = mean(states, weights)
        return all(torch.allclose(merged[name].double(), t, rtol=rtol, atol=1e-7) for name, t in expected.items())

    assert {merged[name].dtype for name in mean(states, [1, 1])} == {dtype}
    assert close([0.25, 1])
    assert not close([0.3, 1])


def test_parameters_that_need_gradients_are_taken_as_they_are() -> None:
    one, two = (dict(net.named_parameters()) for net in nets(2))
    merged = mf.merge_state_dicts("ties", [one], two)
    assert not any(tensor.requires_grad for tensor in merged.values())


def test_tied_weights_stay_tied_under_random_masks() -> None:
    """Masks are keyed by name: without sharing, the two names of one tensor would get two results."""
    model, base = (net.state_dict() for net in nets(2))
    options: dict[str, Any] = {"model_params": [{"density": 0.5}], "seed": 1}
    tied = mf.merge_state_dicts("dare_linear", [model], base, **options)
    assert torch.equal(tied["first.weight"], tied["tied.weight"])
    apart = {name: tensor.clone() for name, tensor in model.items()}
    loose = mf.merge_state_dicts("dare_linear", [apart], base, **options)
    assert not torch.equal(loose["first.weight"], loose["tied.weight"])


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "NaN": (lambda s: s["first.weight"][0, 0].fill_(float("nan")), "state dict 1: 'first.weight' holds NaN or Inf"),
    "complex": (lambda s: s.update(scale=torch.ones((), dtype=torch.complex64)), "'scale' is complex"),
    "int for float": (lambda s: s.update(scale=torch.ones((), dtype=torch.int64)), "'scale' is torch.int64"),
    "missing": (lambda s: s.pop("scale"), "differs from the first in 1 names"),
    "shape": (lambda s: s.update(scale=torch.ones(2)), "one shape"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named(case: str) -> None:
    change, message = BROKEN[case]
    states = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in nets(2)]
    change(states[1])
    with pytest.raises(InputError, match=message):
        mf.merge_state_dicts("linear", states)


def test_parameters_of_models_may_be_filters_or_a_gradient() -> None:
    states = [{f"layers.{i}.w": torch.full((2,), float(v)) for i in range(3)} for v in (1, 3)]
    base = {name: torch.zeros(2) for name in states[0]}
    filters = [{"filter": "layers.1", "value": 0.5}, {"value": 0.0}]
    merged = mf.merge_state_dicts("task_arithmetic", states, base, [{"weight": filters}, {"weight": [0.0, 1.0]}])
    assert [float(merged[f"layers.{i}.w"][0]) for i in range(3)] == [0.0, 2.0, 3.0]
    plain = [{"w": t} for t in (torch.ones(2), torch.ones(2))]
    with pytest.raises(InputError, match="depth="):
        mf.merge_state_dicts("linear", plain, model_params=[{"weight": [0.0, 1.0]}, {}])
    each = [{"density": [{"filter": "layers.1", "value": 0.5}, {"value": 1.0}]}, {}]
    with pytest.raises(InputError, match="one density"):
        mf.merge_state_dicts("ties", states, base, each, trim="global")


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (None, "regmean needs statistics="),
        ([{}, {}], "hold nothing"),
        ([{"w": torch.eye(2)}], "2 state dicts but statistics for 1"),
        ([{"w": torch.eye(2)}, {}], "no statistic of 'w' for model 1"),
        ([{"odd": torch.eye(2)}] * 2, "'odd', which the state dicts do not have"),
        ([{"w": torch.eye(3)}] * 2, "takes 2 inputs"),
        ([{"w": torch.full((2, 2), float("nan"))}] * 2, "NaN"),
        ([mf.Statistics("fisher", {"w": torch.eye(2)}, 1)] * 2, "takes gram statistics"),
    ],
)
def test_statistics_that_do_not_fit(statistics: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mf.merge_state_dicts("regmean", [{"w": torch.ones(2, 2)}, {"w": torch.eye(2)}], statistics=statistics)


def test_a_method_without_data_takes_no_statistics() -> None:
    with pytest.raises(InputError, match="linear takes no statistics"):
        mf.merge_state_dicts("linear", [{"w": torch.ones(2)}] * 2, statistics=[{}, {}])
