"""Gymnasium's Blackjack-v1 solved exactly: a policy over its 280 decision states is scored by dynamic programming.

Infinite deck (1 to 9 with probability 1/13 each, 10 with 4/13); the dealer stands on all 17s; no doubling, no
splitting. `sab` (Sutton and Barto, the registered default): a natural beats a 21 that is none. `natural`: a
natural that wins pays 1.5 (ignored under `sab`, as in Gymnasium).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

State = tuple[int, int, bool]
"""(player's sum, dealer's card, usable ace), as Gymnasium observes it."""
STICK, HIT = 0, 1
CARDS = {**dict.fromkeys(range(1, 10), 1 / 13), 10: 4 / 13}


@dataclass(frozen=True)
class Outcome:
    """Probabilities of winning, drawing and losing a hand, and the expected return."""

    win: float
    draw: float
    loss: float
    expected_return: float


def states() -> list[State]:
    """The 280 decision states: dealer 1 to 10; hard sums 4 to 21, soft sums 12 to 21."""
    hard = [(total, dealer, False) for total in range(4, 22) for dealer in range(1, 11)]
    soft = [(total, dealer, True) for total in range(12, 22) for dealer in range(1, 11)]
    return hard + soft


def add_card(total: int, usable: bool, card: int) -> tuple[int, bool]:
    """(sum, usable ace) after drawing `card` onto a hand; a sum above 21 is bust."""
    hard = total - 10 * usable + card
    ace = usable or card == 1
    return (hard + 10, True) if ace and hard + 10 <= 21 else (hard, False)


@cache
def dealer_totals(card: int) -> dict[tuple[int, bool], float]:
    """Probability of each (final sum, is a natural) of a dealer showing `card`; 22 stands for every bust."""
    found: dict[tuple[int, bool], float] = {}

    def draw(total: int, usable: bool, cards: int, probability: float) -> None:
        if cards >= 2 and total >= 17:
            key = (min(total, 22), cards == 2 and total == 21)
            found[key] = found.get(key, 0.0) + probability
            return
        for drawn, chance in CARDS.items():
            draw(*add_card(total, usable, drawn), cards + 1, probability * chance)

    draw(*add_card(0, False, card), 1, 1.0)
    return found


def stick(total: int, dealer: int, natural: bool, *, sab: bool = True) -> tuple[float, float, float]:
    """(win, draw, loss) of sticking on `total` against a dealer showing `dealer`."""
    win = draw = loss = 0.0
    for (other, other_natural), probability in dealer_totals(dealer).items():
        dealer_score = 0 if other > 21 else other
        if (sab and natural and not other_natural) or total > dealer_score:
            win += probability
        elif total == dealer_score:
            draw += probability
        else:
            loss += probability
    return win, draw, loss


@cache
def starts() -> dict[tuple[int, int, bool, bool], float]:
    """Probability of each dealt (sum, dealer's card, usable ace, is a natural)."""
    found: dict[tuple[int, int, bool, bool], float] = {}
    for first, p in CARDS.items():
        for second, q in CARDS.items():
            total, usable = add_card(*add_card(0, False, first), second)
            for dealer, r in CARDS.items():
                key = (total, dealer, usable, total == 21)
                found[key] = found.get(key, 0.0) + p * q * r
    return found


def evaluate(policy: Mapping[State, int], *, sab: bool = True, natural: bool = False) -> Outcome:
    """Exact outcome of a policy over all states (0 stick, 1 hit)."""
    known: dict[State, tuple[float, float, float]] = {}

    def value(state: State) -> tuple[float, float, float]:
        """(win, draw, loss) from a state reached without a natural in hand."""
        if state not in known:
            total, dealer, usable = state
            known[state] = (
                stick(total, dealer, False, sab=sab) if policy[state] == STICK else _hit(total, dealer, usable, value)
            )
        return known[state]

    win = draw = loss = gain = 0.0
    for (total, dealer, usable, is_natural), probability in starts().items():
        state = (total, dealer, usable)
        if is_natural and policy[state] == STICK:
            one = stick(total, dealer, True, sab=sab)
            pays = _natural_pay(dealer, sab=sab, natural=natural)
        else:
            one, pays = value(state), None
        win, draw, loss = win + probability * one[0], draw + probability * one[1], loss + probability * one[2]
        gain += probability * (one[0] - one[2] if pays is None else pays)
    return Outcome(win, draw, loss, gain)


def _hit(total: int, dealer: int, usable: bool, value: object) -> tuple[float, float, float]:
    assert callable(value)
    win = draw = loss = 0.0
    for card, chance in CARDS.items():
        after, ace = add_card(total, usable, card)
        one = (0.0, 0.0, 1.0) if after > 21 else value((after, dealer, ace))
        win, draw, loss = win + chance * one[0], draw + chance * one[1], loss + chance * one[2]
    return win, draw, loss


def _natural_pay(dealer: int, *, sab: bool, natural: bool) -> float:
    win, _, loss = stick(21, dealer, True, sab=sab)
    return (1.5 if natural and not sab else 1.0) * win - loss


def optimal_policy(*, sab: bool = True) -> dict[State, int]:
    """The policy of highest expected return, by dynamic programming from high sums down."""
    policy = {}
    for state in states():
        sticking, hitting = action_values(state, sab=sab)
        policy[state] = HIT if hitting > sticking else STICK
    return policy


@cache
def action_values(state: State, *, sab: bool = True) -> tuple[float, float]:
    """Expected return of (sticking, hitting) in `state`, without a natural in hand, under optimal play after it."""
    total, dealer, usable = state
    win, _, loss = stick(total, dealer, False, sab=sab)
    hitting = 0.0
    for card, chance in CARDS.items():
        after, ace = add_card(total, usable, card)
        hitting += chance * (-1.0 if after > 21 else max(action_values((after, dealer, ace), sab=sab)))
    return win - loss, hitting
