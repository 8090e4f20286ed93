"""What each task hands to an audit fits together, asked through the registry only."""

from typing import Any

import pytest

from model_fusion.errors import InputError
from model_fusion.evaluate.tasks import NAMES, task
from model_fusion.evaluate.tasks.base import Task
from model_fusion.evaluate.tasks.exchanged import permuted
from model_fusion.report.plots import svg

FAST: dict[str, dict[str, Any]] = {"blackjack": {"expert": "untrained"}}


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest) -> Task:
    return task(request.param, **FAST.get(request.param, {}))


def test_every_test_row_is_a_question_of_the_task(made: Task) -> None:
    asked = {(q.prompt, str(q.inputs)) for q in made.questions()}
    assert {(e.prompt, str(e.inputs)) for e in made.test} <= asked
    assert len(asked) == len(made.all_inputs)


def test_scores_hold_the_metric_and_agreement(made: Task) -> None:
    scores = made.score_examples(made.questions(), made.expert.describe(made.all_inputs))
    assert made.metric.name in scores
    assert scores["agreement"] == 1.0


def test_exchanged_experts_fit_the_bridge_and_judge_otherwise(made: Task) -> None:
    assert made.exchanged
    for make in made.exchanged.values():
        other = make()
        assert other.feature_shape == made.expert.feature_shape
        words = other.describe(made.all_inputs)
        assert made.retold(other).score(made.all_inputs, words)["agreement"] == 1.0
        # The check is red when the old expert judges.
        assert made.score(made.all_inputs, words)["agreement"] < 0.95


def test_the_untrained_expert_fits_and_depends_on_its_seed(made: Task) -> None:
    assert made.untrained is not None
    one, two = made.untrained(1), made.untrained(2)
    assert one.feature_shape == made.expert.feature_shape
    assert not one.encode(made.all_inputs).values.equal(two.encode(made.all_inputs).values)
    assert one.encode(made.all_inputs).values.equal(made.untrained(1).encode(made.all_inputs).values)


def test_the_record_makes_the_task_again(made: Task) -> None:
    record = made.record()
    again = task(record["name"], **record["options"])
    assert [e.answer for e in again.train] == [e.answer for e in made.train]


def test_the_picture_is_drawn(made: Task) -> None:
    if made.draw is not None:
        draw, words = made.draw, made.expert.describe(made.all_inputs)
        words[0] = "no answer at all"
        assert "<svg" in svg(lambda figure: draw(figure, made.all_inputs, words), 6, 6)


def test_permuted_names_each_class_once(made: Task) -> None:
    with pytest.raises(InputError):
        permuted(made.expert, (0, 0))
