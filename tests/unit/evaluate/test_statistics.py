"""Intervals against scipy and against textbook values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from model_fusion.errors import InputError
from model_fusion.evaluate import statistics
from model_fusion.evaluate.statistics import interval, paired, student_t_cdf, student_t_quantile

VALUES = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_textbook_quantiles(freedom: int, t: float) -> None:
    assert student_t_quantile(0.975, freedom) == pytest.approx(t, abs=5e-4)


@given(st.floats(-40, 40), st.integers(1, 60))
def test_cdf_is_scipys(t: float, freedom: int) -> None:
    assert student_t_cdf(t, freedom) == pytest.approx(float(stats.t.cdf(t, freedom)), abs=1e-9)


@given(st.floats(0.01, 0.99), st.integers(1, 40))
def test_quantile_is_scipys(p: float, freedom: int) -> None:
    assert student_t_quantile(p, freedom) == pytest.approx(float(stats.t.ppf(p, freedom)), rel=1e-6, abs=1e-7)


@given(VALUES)
def test_interval_is_scipys(values: list[float]) -> None:
    got = interval(values)
    assert got.n == len(values)
    assert got.mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    error = float(stats.sem(values))
    assert got.low is not None
    assert got.high is not None
    if error > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=got.mean, scale=error)
        assert (got.low, got.high) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


def check_coverage() -> None:
    low = interval([0.0, 1.0, 2.0, 3.0, 4.0]).low
    assert low == pytest.approx(2 - 2.776445 * math.sqrt(2.5) / math.sqrt(5), abs=1e-5)


def test_a_normal_quantile_in_students_place_turns_the_check_red(monkeypatch: pytest.MonkeyPatch) -> None:
    check_coverage()
    monkeypatch.setattr(statistics, "student_t_quantile", lambda p, freedom: 1.96)
    with pytest.raises(AssertionError):
        check_coverage()


@given(VALUES, st.floats(-5, 5))
def test_pairing_cancels_what_a_seed_does_to_both(noise: list[float], shift: float) -> None:
    b = dict(enumerate(noise))
    a = {seed: value + shift for seed, value in b.items()}
    got = paired(a, b)
    assert got.mean == pytest.approx(shift, abs=1e-6)
    assert got.low == pytest.approx(shift, abs=1e-5)


def test_only_common_seeds_are_paired() -> None:
    assert paired({1: 5.0, 2: 7.0, 9: 0.0}, {1: 4.0, 2: 5.0, 3: 100.0}).n == 2
    with pytest.raises(InputError, match="no common seed"):
        paired({1: 0.0}, {2: 0.0})


def test_one_seed_has_no_interval() -> None:
    one = interval([0.5])
    assert (one.low, one.high, one.statement()) == (None, None, "1 value, no interval")
    assert not one.excludes(0.0)
    assert interval([1.0, 1.0, 1.0]).statement() == "3 seeds"


def test_excludes() -> None:
    assert interval([1.0, 1.1, 0.9]).excludes(0.0)
    assert not interval([1.0, -1.0, 0.5]).excludes(0.0)


@pytest.mark.parametrize("bad", [[], [float("nan")], [1.0, float("inf")]])
def test_refuses_what_has_no_mean(bad: list[float]) -> None:
    with pytest.raises(InputError):
        interval(bad)
