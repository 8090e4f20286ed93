"""The exact game against published figures, against gymnasium's own play, and the expert that learns it."""

import gymnasium
import numpy as np
import pytest

from model_fusion.evaluate import blackjack
from model_fusion.evaluate.blackjack import evaluate, optimal_policy, states
from model_fusion.evaluate.hands import play
from model_fusion.evaluate.tasks.blackjack import blackjack_task, decisions, parse


def test_reproduces_the_known_table() -> None:
    best = evaluate(optimal_policy())
    assert (best.win, best.draw, best.loss) == pytest.approx((0.4329, 0.0911, 0.4760), abs=1e-4)
    assert best.expected_return == pytest.approx(-0.04311, abs=1e-5)
    stick = evaluate(dict.fromkeys(states(), 0))
    assert (stick.win, stick.draw, stick.loss) == pytest.approx((0.3842, 0.0487, 0.5671), abs=1e-4)
    assert evaluate({s: int(s[0] < 16) for s in states()}).expected_return == pytest.approx(-0.0718, abs=1e-4)
    other = optimal_policy(sab=False)
    assert evaluate(other, sab=False).expected_return == pytest.approx(-0.04656, abs=1e-5)
    assert evaluate(other, sab=False, natural=True).expected_return == pytest.approx(-0.02573, abs=1e-5)


def test_a_wrong_deck_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blackjack, "CARDS", dict.fromkeys(range(1, 11), 0.1))
    for cached in (blackjack.dealer_totals, blackjack.starts):
        cached.cache_clear()
    wrong = evaluate(optimal_policy()).expected_return
    for cached in (blackjack.dealer_totals, blackjack.starts):
        cached.cache_clear()
    assert wrong != pytest.approx(-0.04311, abs=1e-3)


def test_agrees_with_gymnasiums_own_play() -> None:
    env = gymnasium.make("Blackjack-v1")
    policy = {s: int(s[0] < 16) for s in states()}
    gains = []
    for hand in range(4000):
        state, _ = env.reset(seed=hand)
        over, reward = False, 0.0
        while not over:
            state, reward, over, _, _ = env.step(policy[(int(state[0]), int(state[1]), bool(state[2]))])
        gains.append(reward)
    assert np.mean(gains) == pytest.approx(evaluate(policy).expected_return, abs=4.5 * 0.955 / 4000**0.5)


def test_played_hands_follow_the_rules() -> None:
    hands = play(200_000, np.random.default_rng(0))
    first_stick = hands.reward[hands.action == 0]
    assert set(np.unique(hands.reward)) == {-1.0, 0.0, 1.0}
    assert hands.ended[hands.action == 0].all()
    assert first_stick.size > 50_000
    # Sticking on 20 against a 10 is worth what the solver says.
    here = (hands.action == 0) & (hands.total == 20) & (hands.dealer == 10)
    win, _, loss = blackjack.stick(20, 10, False)
    assert hands.reward[here].mean() == pytest.approx(win - loss, abs=0.03)


@pytest.mark.slow
def test_the_cnn_learns_from_played_hands() -> None:
    task = blackjack_task("grid", seed=0)
    names = decisions(task.expert, states())
    assert task.score(states(), names)["return"] > -0.05
    assert len(task.train) + len(task.validation) == 200
    assert len(task.test) == 80
    labelled = {e.inputs["table"] for e in (*task.train, *task.validation)}
    assert not labelled & {e.inputs["table"] for e in task.test}


def test_an_answer_is_parsed_exactly() -> None:
    assert parse("You should Hit.") == "hit"
    assert parse("hit or stick") is None
    assert parse("white stickers") is None
