"""Ranges in a recipe: found, filled, and refused where they hold nothing. Gradients and filters stay what they were."""

from typing import Any

import pytest

from model_fusion.errors import InputError
from model_fusion.recipe.ranges import Choices, Range, fill, find


def recipe(weight: Any, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": weight}}, {"model": "b"}],
        **more,
    }


def test_a_range_is_found_by_its_place_and_filled_there() -> None:
    data = recipe({"range": [0, 1]})
    assert find(data) == {"models[0].parameters.weight": Range(0, 1)}
    filled = fill(data, {"models[0].parameters.weight": 0.25})
    assert filled == recipe(0.25)
    assert data == recipe({"range": [0, 1]}), "the recipe itself was changed"


def test_gradients_and_filters_are_no_ranges_but_may_hold_them() -> None:
    assert find(recipe([0, 0.5, 1])) == {}
    assert find(recipe([{"filter": "mlp", "value": 0.5}, {"value": [0, 1]}])) == {}
    mixed = recipe([{"filter": "mlp", "value": {"range": [0, 1]}}, {"value": [0, {"range": [1, 2]}]}])
    names = ["models[0].parameters.weight[0].value", "models[0].parameters.weight[1].value[1]"]
    assert list(find(mixed)) == names
    filled = fill(mixed, dict(zip(names, (0.5, 1.5), strict=True)))
    assert filled == recipe([{"filter": "mlp", "value": 0.5}, {"value": [0, 1.5]}])


def test_one_name_in_two_places_is_one_number() -> None:
    one = {"range": [0, 1], "name": "w"}
    data = recipe(one, parameters={"lambda": one})
    assert find(data) == {"w": Range(0, 1)}
    assert fill(data, {"w": 0.5}) == recipe(0.5, parameters={"lambda": 0.5})


def test_whole_numbers_words_and_logarithms() -> None:
    assert find(recipe({"range": [0, 7], "step": 2})) == {"models[0].parameters.weight": Range(0, 6, step=2)}
    assert Range(0, 6, step=2).points(3) == [0, 2, 4, 6]
    assert Range(0.0, 1.0, step=0.5).points(9) == [0.0, 0.5, 1.0]
    assert Range(0.01, 1.0, log=True).points(3) == pytest.approx([0.01, 0.1, 1.0])
    assert find(recipe(1.0, merge_method={"choices": ["ties", "linear"]})) == {
        "merge_method": Choices(("ties", "linear"))
    }


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"range": [1, 0]}, "holds nothing"),
        ({"range": [1, 1]}, "holds nothing"),
        ({"range": [0]}, "give \\[lowest, highest\\]"),
        ({"range": [0, float("nan")]}, "give \\[lowest, highest\\]"),
        ({"range": [0, True]}, "give \\[lowest, highest\\]"),
        ({"range": [0, 1], "log": True}, "above 0"),
        ({"range": [1, 2], "log": True, "step": 0.5}, "without a step"),
        ({"range": [0, 1], "step": 0}, "step 0"),
        ({"range": [0, 1], "step": 2}, "at most 1"),
        ({"range": [0, 1], "setp": 0.5}, "did you mean 'step'"),
        ({"range": [0, 1], "choices": [0, 1]}, "not both"),
        ({"choices": [1]}, "at least two"),
        ({"choices": [1, 1]}, "twice"),
        ({"choices": [1, 2], "log": True}, "belong to a range"),
    ],
)
def test_a_range_that_cannot_be_is_one_line_that_names_its_place(mark: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"models\[0\]\.parameters\.weight.*{message}|{message}") as caught:
        find(recipe(mark))
    assert "models[0].parameters.weight" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_name_for_two_ranges_is_refused() -> None:
    data = recipe({"range": [0, 1], "name": "w"}, parameters={"lambda": {"range": [0, 2], "name": "w"}})
    with pytest.raises(InputError, match="'w' is another range elsewhere"):
        find(data)
