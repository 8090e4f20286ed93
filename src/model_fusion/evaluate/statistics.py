"""Means over seeds with 95 % intervals (Student's t), rates (Wilson), paired differences and tests. Knows nothing of
what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from model_fusion.errors import InputError

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds and its two-sided interval; `low` and `high` are None where one value gives none."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def excludes(self, value: float) -> bool:
        """Is `value` outside the interval? Never true without one."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high

    def statement(self) -> str:
        """How many seeds stand behind the number."""
        return "1 value, no interval" if self.n == 1 else f"{self.n} seeds"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean of `values` and its interval mean ± t · s / √n, with Student's t of n - 1 degrees of freedom.
    Raises InputError for no value, or for one that is not finite."""
    if not values:
        raise InputError("no values: a mean needs at least one")
    if not all(math.isfinite(v) for v in values):
        raise InputError(f"values must be finite, got {list(values)}")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Interval(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = student_t_quantile(0.5 + level / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(a: Mapping[int, float], b: Mapping[int, float], level: float = LEVEL) -> Interval:
    """Interval of a - b over the seeds that both have. Raises InputError where they share none."""
    seeds = sorted(set(a) & set(b))
    if not seeds:
        raise InputError(f"no common seed: {sorted(a)} and {sorted(b)}")
    return interval([a[seed] - b[seed] for seed in seeds], level)


def student_t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for a whole number of degrees of freedom, in closed form (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    if freedom < 1:
        raise InputError(f"degrees of freedom must be at least 1, got {freedom}")
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total  # P(|T| <= t), with t's sign
    return 0.5 + inside / 2


def student_t_quantile(p: float, freedom: int) -> float:
    """The t with P(T <= t) = p, by bisection. Raises InputError for p outside (0, 1)."""
    if not 0 < p < 1:
        raise InputError(f"a probability strictly between 0 and 1 is needed, got {p}")
    if p < 0.5:
        return -student_t_quantile(1 - p, freedom)
    high = 1.0
    while student_t_cdf(high, freedom) < p:
        high *= 2
    low = 0.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if student_t_cdf(middle, freedom) < p else (low, middle)
    return high


@dataclass(frozen=True)
class Rate:
    """How many of `n` did it, and the share with its interval."""

    count: int
    n: int
    rate: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def wilson(count: int, n: int, z: float = 1.959963984540054) -> Rate:
    """The share count / n with Wilson's score interval (Wilson 1927), which stays in [0, 1] and is honest at its ends.
    Raises InputError for counts that are none."""
    if n < 1 or not 0 <= count <= n:
        raise InputError(f"{count} of {n}: a share needs 0 <= count <= n and n > 0")
    share, slack = count / n, z * z / n
    centre = (share + slack / 2) / (1 + slack)
    half = z / (1 + slack) * math.sqrt(share * (1 - share) / n + slack / (4 * n))
    low, high = (0.0 if count == 0 else centre - half), (1.0 if count == n else centre + half)
    return Rate(count, n, share, low, high)


def sign_test(first: int, second: int) -> float:
    """Two-sided p of pairs that differ, `first` one way and `second` the other, if both ways were equally likely
    (the exact form of McNemar's test)."""
    n, k = first + second, min(first, second)
    tail: int = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2.0**n)
