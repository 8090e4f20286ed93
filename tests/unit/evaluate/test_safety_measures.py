"""Refusal by rules, rates, tests of pairs, the refusal direction: each against a reference written out here."""

import itertools
import math

import pytest
import torch

from model_fusion.errors import InputError
from model_fusion.evaluate import statistics
from model_fusion.evaluate.safety import direction as directions
from model_fusion.evaluate.safety.direction import States, direction, separation
from model_fusion.evaluate.safety.prompts import Prompts, bundled
from model_fusion.evaluate.safety.refusal import OPENING, refuses
from model_fusion.evaluate.statistics import sign_test, wilson


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("I cannot help with that.", True),
        ("I'm sorry, but no.", True),
        ("I’m  sorry, but\nno.", True),
        ("Sure! As an AI, I must decline.", True),
        ("Sure. Run kill with the process id.", False),
        ("", False),
        ("I cannothelp", False),
        ("Bi cannot", False),
        ("word " * OPENING + "I cannot help with that.", False),
    ],
)
def test_a_refusal_is_known_by_how_an_answer_begins(answer: str, wanted: bool) -> None:
    assert refuses(answer) is wanted


def test_own_phrases_replace_the_built_in_ones() -> None:
    assert refuses("Nope, never.", ["nope"])
    assert not refuses("I cannot.", ["nope"])


def test_bundled_prompts_are_pairs_of_distinct_requests() -> None:
    found = bundled()
    assert len(found.harmful) == len(found.benign) == 60
    assert len({*found.harmful, *found.benign}) == 120
    assert not any(refuses(text) for text in (*found.harmful, *found.benign))


def test_prompts_need_both_kinds() -> None:
    with pytest.raises(InputError, match="at least one harmful"):
        Prompts((), ("a",), "mine")


def check_wilson() -> None:
    """The interval's ends are the shares whose own standard score reaches `count`: its definition."""
    for count, n in [(0, 60), (3, 60), (30, 60), (60, 60), (1, 1)]:
        rate = statistics.wilson(count, n)
        for end in (rate.low, rate.high):
            if 0 < end < 1:
                score = abs(count / n - end) / math.sqrt(end * (1 - end) / n)
                assert score == pytest.approx(1.959963984540054, rel=1e-6)
        assert 0 <= rate.low <= rate.rate <= rate.high <= 1


def test_wilson_inverts_the_score_test() -> None:
    check_wilson()
    assert wilson(0, 60).high == pytest.approx(0.0602, abs=1e-4)
    with pytest.raises(InputError, match="3 of 2"):
        wilson(3, 2)


def test_mutation_a_normal_interval_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def normal(count: int, n: int) -> statistics.Rate:
        share = count / n
        half = 1.96 * math.sqrt(share * (1 - share) / n)
        return statistics.Rate(count, n, share, max(0.0, share - half), min(1.0, share + half))

    monkeypatch.setattr(statistics, "wilson", normal)
    with pytest.raises(AssertionError):
        check_wilson()


def test_the_sign_test_counts_outcomes_as_unlikely() -> None:
    for first, second in [(0, 0), (1, 0), (5, 1), (4, 4), (2, 9)]:
        n = first + second
        outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
        extreme = sum(abs(k - n / 2) >= abs(first - n / 2) for k in outcomes) / len(outcomes)
        assert sign_test(first, second) == pytest.approx(min(1.0, extreme))


def drawn() -> States:
    generator = torch.Generator().manual_seed(0)
    good = torch.randn(7, 3, 5, generator=generator)
    bad = torch.randn(9, 3, 5, generator=generator)
    bad[:, 1, 2] += 4
    return States(bad, good)


def check_direction() -> None:
    found = drawn()
    along = directions.direction(found)
    apart = directions.separation(found, along)
    for layer in range(3):
        means = [sum(part[:, layer].double()) / len(part) for part in (found.harmful, found.benign)]
        difference = means[0] - means[1]
        unit = difference / math.sqrt(sum(float(x) ** 2 for x in difference))
        assert torch.allclose(along[layer].double(), unit, atol=1e-6)
        bad, good = ([float(row[layer].double() @ unit) for row in part] for part in (found.harmful, found.benign))
        wins = sum((b > g) + 0.5 * (b == g) for b in bad for g in good) / len(bad) / len(good)
        assert apart.ordered[layer] == pytest.approx(wins)

        def spread(values: list[float]) -> float:
            mean = sum(values) / len(values)
            return sum((v - mean) ** 2 for v in values) / (len(values) - 1)

        wanted = (sum(bad) / len(bad) - sum(good) / len(good)) / math.sqrt((spread(bad) + spread(good)) / 2)
        assert apart.distance[layer] == pytest.approx(wanted, rel=1e-5)


def test_direction_and_separation_equal_a_naive_reference() -> None:
    check_direction()
    planted = separation(drawn(), direction(drawn()))
    assert max(planted.distance) == planted.distance[1]


@pytest.mark.parametrize("name", ["direction", "separation"])
def test_mutation_a_wrong_direction_or_distance_is_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def swapped(found: States) -> torch.Tensor:
        return direction(States(found.benign, found.harmful))

    def doubled(found: States, along: torch.Tensor) -> directions.Separation:
        right = separation(found, along)
        return directions.Separation(tuple(2 * d for d in right.distance), right.ordered)

    monkeypatch.setattr(directions, name, {"direction": swapped, "separation": doubled}[name])
    with pytest.raises(AssertionError):
        check_direction()


def test_the_layer_is_chosen_on_quarters_and_ties_go_to_the_wider_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 tells apart by 30 spreads and layer 2 by 300: both order all requests, the wider one is taken. Layer 0
    has more dimensions of noise than requests, so on its own rows its direction orders everything."""
    generator = torch.Generator().manual_seed(0)
    bad, good = torch.randn(8, 3, 64, generator=generator), torch.randn(8, 3, 64, generator=generator)
    for layer, gap in ((1, 30.0), (2, 300.0)):
        bad[:, layer, 0] += gap
    found = directions.best_layer(States(bad, good))
    assert (found.layer, found.ordered) == (2, 1.0)
    assert separation(States(bad, good), direction(States(bad, good))).ordered[0] == 1.0
    chance = States(bad[:, :1], good[:, :1])
    assert directions.best_layer(chance).ordered < 0.9
    with monkeypatch.context() as patch:  # a half measured on itself: noise looks like a direction
        patch.setattr(States, "half", lambda self, odd: self)
        assert directions.best_layer(chance).ordered == 1.0


def test_equal_states_have_no_direction_and_no_distance() -> None:
    same = States(torch.ones(4, 2, 3), torch.ones(4, 2, 3))
    assert not direction(same).any()
    assert separation(same, direction(same)) == directions.Separation((0.0, 0.0), (0.5, 0.5))
