"""Twin-Merging: a batch gives what merging the weights for each row gives, whatever the layers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from model_fusion.dynamic import parts as parts_module
from model_fusion.dynamic import twin as twin_module
from model_fusion.dynamic.parts import exclusive, rank_of, truncated
from model_fusion.dynamic.twin import TwinModel
from model_fusion.errors import InputError

EXPERTS = 3


class Picture(nn.Module):
    """Convolution, batch norm, layer norm, linear layers with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.norm, self.first, self.last = nn.LayerNorm(16), nn.Linear(16, 12), nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.batch(self.conv(x))).flatten(1)
        return self.last(torch.tanh(self.first(self.norm(x))))


class Words(nn.Module):
    """An embedding tied to the head, and a norm of torch's over every word."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 6), nn.RMSNorm(6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(ids)))


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "picture": (Picture, torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(1))),
    "words": (Words, torch.arange(12).view(4, 3) % 11),
}


def states(make: Callable[[], nn.Module]) -> list[dict[str, Tensor]]:
    """Random weights, biases, norms and running statistics: the shared model's, then the experts'."""
    found = []
    for seed in range(EXPERTS + 1):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(std=0.5)
        found.append({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    return found


def apart(kind: str, fraction: float = 0.4) -> float:
    """Largest difference between the batch and a naive merge for each row."""
    make, x = CASES[kind]
    shared, *experts = states(make)
    model = make()
    model.load_state_dict(shared)
    twin = TwinModel(model, exclusive(shared, experts, fraction))
    weights = torch.rand(len(x), EXPERTS, generator=torch.Generator().manual_seed(2)).softmax(-1)
    got = twin(x, expert_weights=weights)
    plain = make().eval()
    worst = 0.0
    for row, given in enumerate(weights):
        merged = dict(shared)
        for name, tensor in shared.items():
            for w, expert in zip(given, experts, strict=True):
                if tensor.is_floating_point():
                    merged[name] = merged[name] + w * naive(expert[name] - tensor, fraction)
        plain.load_state_dict(merged)
        worst = max(worst, float((plain(x[row : row + 1])[0] - got[row]).detach().abs().max()))
    return worst


def naive(difference: Tensor, fraction: float) -> Tensor:
    """SVD_r of a matrix; a vector as it is."""
    if difference.dim() < 2:
        return difference
    u, s, vh = torch.linalg.svd(difference.flatten(1).double(), full_matrices=False)
    r = max(1, int(fraction * min(difference.flatten(1).shape)))
    return ((u[:, :r] * s[:r]) @ vh[:r]).float().view(difference.shape)


@pytest.mark.parametrize("kind", CASES)
def test_a_batch_equals_merging_for_each_row(kind: str) -> None:
    assert apart(kind) < 1e-5


@pytest.mark.parametrize("broken", ["_linear", "_embedding", "_each_row", "mixed", "truncated"])
def test_a_wrong_formula_is_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == "mixed":  # the same weights for all rows
        right = parts_module.Part.mixed
        monkeypatch.setattr(
            parts_module.Part, "mixed", lambda self, w: right(self, w.mean(0, keepdim=True).expand_as(w))
        )
    elif broken == "truncated":  # the factors of rank one
        cut = parts_module.truncated
        monkeypatch.setattr(parts_module, "truncated", lambda matrix, rank: cut(matrix, 1))
    elif broken == "_each_row":
        monkeypatch.setattr(twin_module, "_each_row", lambda twin, module, w, p, args, o: plain(twin, module, args))
    else:  # a layer left as it is
        monkeypatch.setattr(twin_module, broken, lambda output, *rest, **named: output)
    assert max(apart(kind) for kind in CASES) > 1e-3


def plain(twin: TwinModel, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    with twin.weighted(None):
        return module(*args)


def test_merged_is_the_model_of_one_row() -> None:
    make, x = CASES["picture"]
    shared, *experts = states(make)
    model = make()
    model.load_state_dict(shared)
    twin = TwinModel(model, exclusive(shared, experts, 1.0))
    weights = torch.tensor([0.0, 1.0, 0.0])
    other = make().eval()
    other.load_state_dict(experts[1])
    torch.testing.assert_close(twin(x, expert_weights=weights.expand(4, 3)), other(x), atol=1e-4, rtol=0)
    other.load_state_dict(twin.merged(weights))
    torch.testing.assert_close(twin(x, expert_weights=weights.expand(4, 3)), other(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(7, 20), (20, 7), (9, 9)])
def test_truncation_is_the_best_approximation(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    up, down = truncated(matrix, 3)
    torch.testing.assert_close(up @ down, (u[:, :3] * s[:3]) @ vh[:3], atol=1e-5, rtol=1e-5)


def test_a_difference_of_low_rank_is_stored_at_its_rank() -> None:
    thin = torch.randn(20, 2) @ torch.randn(2, 30)
    up, down = truncated(thin, 10)
    assert up.shape[1] == down.shape[0] == 2
    assert exclusive({"a": thin}, [{"a": thin.clone()}], 0.5) == {}
    assert rank_of((20, 30), 0.1) == 2
    assert rank_of((5, 30), 0.1) == 1


def test_what_does_not_fit_is_refused() -> None:
    shared, *experts = states(Words)
    with pytest.raises(InputError, match="rank 0"):
        exclusive(shared, experts, 0)
    with pytest.raises(InputError, match="differ in 1 tensors, first 'more'"):
        exclusive(shared, [{**experts[0], "more": torch.zeros(1)}], 0.5)
    with pytest.raises(InputError, match="NaN or Inf"):
        exclusive(shared, [{**experts[0], "norm.weight": torch.full((6,), torch.nan)}], 0.5)
    twin = TwinModel(Words(), exclusive(shared, experts, 0.5))
    assert list(twin.parts) == ["embed.weight", "norm.weight"]  # the tied head has the embedding's
    with pytest.raises(InputError, match="no router"):
        twin(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(InputError, match=r"expected \[batch, 3\]"):
        twin(torch.zeros(2, 3, dtype=torch.long), expert_weights=torch.ones(2, 4))
    with pytest.raises(InputError, match="batch first"):
        twin(torch.zeros(2, 3, dtype=torch.long), expert_weights=torch.ones(3, 3))
    with pytest.raises(InputError, match="no tensor 'norm"):
        TwinModel(nn.Linear(2, 2), exclusive({"norm.weight": torch.zeros(2)}, [{"norm.weight": torch.ones(2)}], 1))
