"""Exactly k are kept, ties by the lowest flat index; ranks and random masks are what they claim to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_fusion.merge.methods import Key, della, get, random_masks, selection
from model_fusion.merge.methods.blocks import delta_blocks, sizes
from model_fusion.merge.methods.compiled import kernel
from model_fusion.merge.methods.della import Ranked
from model_fusion.merge.methods.selection import Cut, cuts

from . import reference

# larger than a block and than the sample, so that brackets are guessed
LARGE = 300_000


def values_of(kind: str, n: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    made = {
        "continuous": lambda: rng.standard_normal(n),
        "tied": lambda: rng.integers(-9, 10, n) / 8,
        "equal": lambda: np.full(n, 0.5),
        "zeros": lambda: np.where(rng.random(n) < 0.9, 0.0, rng.standard_normal(n)),
        "rising": lambda: np.arange(n) / n,
        # what a sample of every s-th element sees is nothing like the rest
        "misleading": lambda: (
            np.where(np.arange(n) % (max(1, n // selection._SAMPLE) | 1) == 0, 100.0, 0.0) + rng.integers(0, 5, n)
        ),
        "few": lambda: np.where(np.arange(n) == n // 2, 3.0, 0.0),
    }
    return torch.from_numpy(made[kind]()).float()


KINDS = ("continuous", "tied", "equal", "zeros", "rising", "misleading", "few")


def exact_k(values: torch.Tensor, k: int, chunk: int) -> bool:
    """Whether the cut, applied in chunks, keeps what a stable sort keeps."""
    cut = cuts(delta_blocks(values, None), sizes(values.numel()), [k])[0]
    got = [cut.drop_small_(part.clone(), i * chunk) for i, part in enumerate(torch.split(values, chunk))]
    return bool(np.array_equal(torch.cat(got).numpy(), reference.keep_largest(values.numpy(), k)))


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(KINDS), st.integers(1, 400), st.integers(0, 99))
def test_selection_equals_a_stable_sort(data: Any, kind: str, n: int, seed: int) -> None:
    assert exact_k(values_of(kind, n, seed), data.draw(st.integers(0, n)), 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 29, LARGE // 3, LARGE - 1, LARGE])
def test_selection_equals_a_stable_sort_where_it_samples(kind: str, k: int) -> None:
    assert exact_k(values_of(kind, LARGE, 5), k, 70_000)


def keep_ties(patch: pytest.MonkeyPatch) -> None:
    real = selection._settle
    patch.setattr(selection, "_settle", lambda *a: Cut(real(*a).threshold, 1 << 62))


def believe_the_sample(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(selection._Search, "missed", lambda self, k: None)


@pytest.mark.parametrize(("mutate", "kind"), [(keep_ties, "tied"), (believe_the_sample, "misleading")])
def test_the_selection_check_goes_red(mutate: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = values_of(kind, LARGE, 5)
    assert exact_k(values, LARGE // 3, 70_000)
    mutate(monkeypatch)
    # a wrong bracket may also hold fewer values than are asked of it
    with pytest.raises((AssertionError, ValueError, IndexError)):
        assert exact_k(values, LARGE // 3, 70_000)


def test_a_share_counts_non_zero_values_only() -> None:
    values = values_of("zeros", LARGE, 3)
    want = int(np.count_nonzero(values.numpy()) * 0.4)
    cut = cuts(delta_blocks(values, None), sizes(LARGE), [0.4])[0]
    assert int(torch.count_nonzero(cut.drop_small_(values.clone(), 0))) == want


def rows_of(kind: int, rows: int, columns: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    x = np.abs(rng.standard_normal((rows, columns)))
    made = (x, np.round(4 * x) / 4, 1 + x / 1000, np.where(rng.random(x.shape) < 0.5, 0, x * 10.0 ** -(9 * x)))
    return made[kind].astype(np.float32)


def ranks_right(kind: int, rows: int, columns: int, seed: int) -> bool:
    size = rows_of(kind, rows, columns, seed)
    rank = reference.della_probabilities(size.astype(np.float64), 0.5, 0.5) * (columns - 1)
    limit = np.random.default_rng(seed).integers(-columns, 3 * columns, size.shape) / 2
    got = della.above_rank(size.view(np.int32), limit.astype(np.float32))
    return bool(np.array_equal(got, np.round(2 * rank) > 2 * limit))


def without_kernel(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(della, "kernel", lambda name: None)


@pytest.mark.parametrize("compiled", [True, False])
@settings(deadline=None, max_examples=60)
@given(kind=st.integers(0, 3), rows=st.integers(1, 6), columns=st.integers(2, 200), seed=st.integers(0, 999))
def test_ranks_within_rows_are_mean_ranks(compiled: bool, kind: int, rows: int, columns: int, seed: int) -> None:
    assert kernel("above_rank") is not None
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            without_kernel(patch)
        assert ranks_right(kind, rows, columns, seed)


def test_the_rank_check_goes_red(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernel(monkeypatch)
    real = della._rank_inside
    monkeypatch.setattr(della, "_rank_inside", lambda *a: real(*a) + 0.5)
    assert not all(ranks_right(kind, 5, 80, seed) for kind in range(4) for seed in range(10))


def kept_shares(delta: torch.Tensor, p: Ranked) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How often each element survives 4,000 seeds."""
    draws = [della.keep_rows(delta.abs(), p, Key(seed, "w"), 0, 0) for seed in range(4000)]
    return np.mean([(-d.float()).numpy() for d in draws], axis=0)


@pytest.mark.parametrize("epsilon", [0.0, 0.15, 0.4])
def test_della_keeps_with_the_formulas_probability(epsilon: float) -> None:
    delta = torch.from_numpy(rows_of(1, 3, 20, 8))
    want = reference.della_probabilities(delta.double().numpy(), 0.5, epsilon)
    got = kept_shares(delta, Ranked(density=0.5, epsilon=epsilon))
    assert np.abs(got - want).max() < 5 * np.sqrt(0.25 / 4000)
    assert not np.abs(kept_shares(delta, Ranked(density=0.4, epsilon=epsilon)) - want).max() < 5 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dare_keeps_its_density_and_masks_do_not_repeat(density: float) -> None:
    n = 200_000
    masks = [
        random_masks.kept(density, seed, name, i, 0, n) for seed, name, i in ((0, "a", 0), (0, "a", 1), (0, "b", 0))
    ]
    shares = [float(-m.float().mean()) for m in masks]
    assert all(abs(share - density) < 5 * np.sqrt(0.25 / n) for share in shares)
    if 0 < density < 1:
        both = float((masks[0].float() * masks[1].float()).mean())
        assert abs(both - density**2) < 5 * np.sqrt(0.25 / n)
    assert torch.equal(masks[0][70_000:90_000], random_masks.kept(density, 0, "a", 0, 70_000, 20_000))


def zero_where_none_is_kept(method: str) -> bool:
    g = torch.Generator().manual_seed(0)
    base, model = torch.randn(9, 40, generator=g), torch.randn(9, 40, generator=g)
    chosen = get(method)
    extra = {"epsilon": 0.0} if method.startswith("della") else {}
    run = {
        d: chosen.run([model], base, [chosen.model_params(density=d, **extra)], None, Key(1, "w")) for d in (0.0, 1.0)
    }
    return bool(torch.equal(run[0.0], base) and torch.allclose(run[1.0], model, atol=1e-6))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_edge_densities_of_the_random_methods(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert zero_where_none_is_kept(method)
    monkeypatch.setattr("model_fusion.merge.methods.dare.apply_mask_", lambda values, mask: values)
    assert not zero_where_none_is_kept(method)
