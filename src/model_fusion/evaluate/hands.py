"""Hands of Blackjack-v1 played many at a time, and what they say of each state and action.

Nothing here knows the solver in `blackjack.py`: an expert learns from these played hands only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Transitions:
    """N decisions of played hands: state columns, action (0 stick, 1 hit), reward, next state, whether it ended."""

    total: Ints
    dealer: Ints
    usable: Bools
    action: Ints
    reward: NDArray[np.float64]
    next_total: Ints
    next_usable: Bools
    ended: Bools

    def state(self) -> Ints:
        return index(self.total, self.dealer, self.usable)

    def next_state(self) -> Ints:
        return index(self.next_total, self.dealer, self.next_usable)


def index(total: Ints, dealer: Ints, usable: Bools) -> Ints:
    """A state's row in a table of 2 x 22 x 11."""
    return (usable.astype(np.int64) * 22 + np.minimum(total, 21)) * 11 + dealer


def draw(rng: np.random.Generator, count: int) -> Ints:
    """Cards of an infinite deck: 1 to 9 once in 13, 10 four times."""
    return np.minimum(rng.integers(1, 14, count), 10)


def add(total: Ints, usable: Bools, card: Ints) -> tuple[Ints, Bools]:
    """Sums and usable aces after one more card a hand."""
    hard = total - 10 * usable + card
    ace = (usable | (card == 1)) & (hard + 10 <= 21)
    return np.where(ace, hard + 10, hard), ace


def play(hands: int, rng: np.random.Generator) -> Transitions:
    """`hands` hands under the registered rules (`sab`), each action a fair coin."""
    none = np.zeros(hands, dtype=np.int64), np.zeros(hands, dtype=bool)
    dealer = draw(rng, hands)
    total, usable = add(*add(*none, draw(rng, hands)), draw(rng, hands))
    natural = total == 21
    alive = np.arange(hands)
    parts: list[tuple[NDArray[np.generic], ...]] = []
    while len(alive):
        action = rng.integers(0, 2, len(alive))
        before, ace = total[alive], usable[alive]
        after, after_ace = add(before, ace, draw(rng, len(alive)))
        hit = action == 1
        bust = hit & (after > 21)
        reward = np.where(bust, -1.0, 0.0)
        stay = alive[~hit]
        reward[~hit] = settle(total[stay], natural[stay], dealer[stay], rng)
        parts.append((before, dealer[alive], ace, action, reward, after, after_ace, ~hit | bust))
        total[alive], usable[alive], natural[alive] = after, after_ace, False
        alive = alive[hit & ~bust]
    return Transitions(*(np.concatenate([part[i] for part in parts]) for i in range(8)))


def settle(total: Ints, natural: Bools, shown: Ints, rng: np.random.Generator) -> NDArray[np.float64]:
    """The dealer draws to 17; rewards of the hands that stuck."""
    other, ace = add(np.zeros_like(total), np.zeros(len(total), dtype=bool), shown)
    other, ace = add(other, ace, draw(rng, len(total)))
    dealer_natural = other == 21
    drawing = np.flatnonzero(other < 17)
    while len(drawing):
        other[drawing], ace[drawing] = add(other[drawing], ace[drawing], draw(rng, len(drawing)))
        drawing = drawing[other[drawing] < 17]
    result = np.sign(total - np.where(other > 21, 0, other)).astype(np.float64)
    return np.where(natural & ~dealer_natural, 1.0, result)
