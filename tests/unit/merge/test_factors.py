"""Low-rank factors against numpy's singular values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.merge.lora import factors
from model_fusion.merge.lora.factors import Wanted, average, join, retruncate, truncate


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best(matrix: Tensor, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def is_best(matrix: Tensor, rank: int, exact: bool) -> bool:
    made = truncate(matrix, Wanted(rank, exact=exact))
    target = best(matrix, rank)
    near = np.allclose((made.b @ made.a).numpy(), target, atol=1e-4)
    share = (target**2).sum() / matrix.double().square().sum().item()
    return bool(near and made.share == pytest.approx(share, abs=1e-4) and made.rank == rank)


def decaying(seed: int, rows: int, columns: int) -> Tensor:
    u, _, vh = torch.linalg.svd(random(seed, rows, columns), full_matrices=False)
    return u * (0.6 ** torch.arange(u.shape[1])) @ vh


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 50), rows=st.integers(4, 60), columns=st.integers(4, 60), exact=st.booleans())
def test_truncation_is_the_best_of_its_rank(seed: int, rows: int, columns: int, exact: bool) -> None:
    assert is_best(decaying(seed, rows, columns), 3, exact)


def test_a_value_too_few_turns_it_red(monkeypatch: pytest.MonkeyPatch) -> None:
    real = factors._svd

    def blurred(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = real(matrix)
        return u, s * torch.tensor([1.0, 1.01, *[1.0] * (len(s) - 2)]), vh

    matrix = decaying(0, 30, 20)
    assert is_best(matrix, 3, True)
    monkeypatch.setattr(factors, "_svd", blurred)
    assert not is_best(matrix, 3, True)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_takes_the_smallest_rank(energy: float, exact: bool) -> None:
    matrix = random(1, 80, 60) @ random(2, 60, 60)
    squares = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    wanted = int((np.cumsum(squares) / squares.sum() < energy * (1 - 1e-6)).sum()) + 1
    made = truncate(matrix, Wanted(energy=energy, exact=exact))
    assert abs(made.rank - wanted) <= (0 if exact else 1)
    assert made.share >= energy * (1 - 1e-5)


def test_the_zero_matrix_has_rank_0() -> None:
    made = truncate(torch.zeros(5, 7), Wanted(3))
    assert (made.rank, made.share) == (0, 1.0)
    assert (made.a.shape, made.b.shape) == ((0, 7), (5, 0))


@pytest.mark.parametrize(
    ("rank", "energy", "message"),
    [(None, None, "give a rank"), (0, None, "rank 0"), (None, 0.0, "energy 0"), (None, 1.5, "energy 1.5")],
)
def test_what_cannot_be_wanted(rank: int | None, energy: float | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Wanted(rank, energy)


def pairs() -> list[tuple[Tensor, Tensor, float]]:
    return [(random(i, r, 30), random(i + 9, 40, r), w) for i, (r, w) in enumerate([(4, 0.5), (3, -2.0), (4, 1.0)])]


def test_join_is_the_exact_sum_and_retruncation_its_best_cut() -> None:
    total = sum((w * b.double() @ a.double() for a, b, w in pairs()), torch.zeros(()).double())
    a, b = join(pairs())
    assert torch.allclose((b @ a).double(), total, atol=1e-4)
    made = retruncate(a, b, Wanted(5))
    assert np.allclose((made.b @ made.a).numpy(), best(total, 5), atol=1e-4)
    squares = torch.linalg.svdvals(total).square()
    assert made.share == pytest.approx(float(squares[:5].sum() / squares.sum()), abs=1e-6)
    assert retruncate(a * 0, b, Wanted(5)).rank == 0


def test_average_has_cross_terms() -> None:
    one, two = [(a, b, w) for a, b, w in pairs() if a.shape[0] == 4]
    a, b = average([one, two])
    assert torch.allclose(a, 0.5**0.5 * one[0] + two[0])
    assert torch.allclose(b, 0.5**0.5 * one[1] + two[1])
    with pytest.raises(InputError, match="one rank"):
        average(pairs())
