"""Streamed statistics are the batch's, domains do not touch each other, and ridge solves what it says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mix_fixtures import model
from model_fusion.mix import statistics
from model_fusion.mix.gates.ridge import solve
from model_fusion.mix.statistics import Statistics, StatisticsFolder, accuracy, collect, router_inputs


@pytest.fixture(scope="module")
def dense() -> Any:
    return model("llama", 0)


def windows(seed: int, count: int = 17) -> Tensor:
    return torch.randint(0, 256, (count, 16), generator=torch.Generator().manual_seed(seed))


def streamed_is_batch(dense: Any) -> None:
    """Against one regression in float64 over all kept inputs at once."""
    domains, inputs, labels = [], [], []
    for d in range(3):
        ids = windows(d)
        domains.append(collect(dense, ids, [0, 1]))
        probing = [n for n in range(len(ids)) if n % 8 == 7]
        kept = [n for n in range(len(ids)) if n not in probing]
        inputs.append(router_inputs(dense, ids[kept], [1])[0].double())
        labels.append(torch.full((len(kept) * 16,), d))
    x, y = torch.cat(inputs), torch.nn.functional.one_hot(torch.cat(labels)).double()
    count = len(inputs[0])
    gram = sum(d.gram[1] / d.count for d in domains)
    cross = torch.stack([d.total[1] / d.count for d in domains], dim=1)
    strength = 1e-3
    penalty = strength * (x.T @ x / count).trace() / x.shape[1] * torch.eye(x.shape[1], dtype=torch.float64)
    batch = torch.linalg.solve(x.T @ x / count + penalty, x.T @ y / count).T
    assert (solve(gram, cross, strength) - batch).abs().max() <= 1e-4


def test_streamed_ridge_is_batch_ridge(dense: Any) -> None:
    streamed_is_batch(dense)


def test_a_forgotten_batch_is_noticed(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Statistics.add

    def wrong(self: Statistics, inputs: Tensor) -> None:
        if self.count == 0:
            right(self, inputs)

    monkeypatch.setattr(Statistics, "add", wrong)
    with pytest.raises(AssertionError):
        streamed_is_batch(dense)


def test_the_router_input_is_what_the_ffn_receives(dense: Any) -> None:
    ids = windows(0, 2)
    seen = []
    handle = dense.model.layers[1].post_attention_layernorm.register_forward_hook(lambda m, a, out: seen.append(out))
    expected = router_inputs(dense, ids, [1])[0]
    handle.remove()
    assert torch.equal(seen[0].reshape(-1, 32), expected)


def test_adding_an_expert_leaves_earlier_statistics_bit_identical(dense: Any, tmp_path: Path) -> None:
    store = StatisticsFolder(tmp_path)
    ids = windows(1)
    file = store.file("first", "trunk", ids, [0, 1])
    store.save(file, collect(dense, ids, [0, 1]))
    before = file.read_bytes()
    other = store.file("second", "trunk", windows(2), [0, 1])
    store.save(other, collect(dense, windows(2), [0, 1]))
    found = store.load(file)
    assert found is not None
    assert file.read_bytes() == before
    fresh = collect(dense, ids, [0, 1])
    assert torch.equal(found.gram, fresh.gram)
    assert torch.equal(found.total, fresh.total)


def test_statistics_of_another_text_or_trunk_are_not_reused(tmp_path: Path) -> None:
    store = StatisticsFolder(tmp_path)
    files = {store.file("d", trunk, windows(seed), [0]) for trunk in ("a", "b") for seed in (1, 2)}
    assert len(files) == 4


def test_ridge_tells_separable_domains_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    domains = []
    for d in range(3):
        centre = torch.zeros(8)
        centre[d] = 3.0
        x = torch.randn(1, 400, 8, generator=generator) + centre
        made = statistics.Statistics.empty(1, 8)
        made.add(x[:, :300])
        made.probe = x[:, 300:]
        domains.append(made)
    gram = sum(d.gram[0] / d.count for d in domains)
    cross = torch.stack([d.total[0] / d.count for d in domains], dim=1)
    assert accuracy(solve(gram, cross, 1e-3).float()[None], domains)[0] > 0.95
