"""Exact parsing, the constant baseline, and which question types count."""

import json
from pathlib import Path

import pytest

from model_fusion.errors import InputError
from model_fusion.evaluate.composition import best_constant, exact, parity, question_types, scored

FILE = Path(__file__).parents[3] / "benchmarks" / "align_questions.json"


def test_an_answer_is_the_answer_and_nothing_else() -> None:
    assert exact(" odd.\n", "odd")
    assert exact("I have two apples", "I have two apples.")
    for wrong in ("odd or even", "Odd", "", "od", "odd odd", "not odd"):
        assert not exact(wrong, "odd")


def test_the_best_constant_answer_is_the_most_frequent_one() -> None:
    assert best_constant(["no", "yes", "no", "no"]) == 0.75


def test_types_count_only_where_the_oracle_beats_a_constant() -> None:
    answers = ["a", "b", "c", "d", "a"]
    knows = scored(["a", "b", "x", "d", "a"], ["a", "b", "c", "d", "a"], answers)
    guesses = scored(["a"] * 5, ["a"] * 5, answers)
    assert (knows.fused, knows.oracle, knows.constant, knows.same) == (0.8, 1.0, 0.4, 0.8)
    assert knows.counts
    assert not guesses.counts
    assert parity({"knows": knows, "guesses": guesses}) == 0.8
    with pytest.raises(InputError, match="20 points"):
        parity({"guesses": guesses})


def test_the_prompt_ends_where_the_digit_is_said() -> None:
    types = question_types(FILE)
    assert len(types) >= 10
    for one in types:
        turns = one.prompt("<|picture|>")
        assert [t["role"] for t in turns] == ["user", "assistant"] * 5 + ["user"]
        assert ["<|picture|>" in t["content"] for t in turns] == [False] * 10 + [True]


def test_no_held_out_question_is_a_training_prompt() -> None:
    from model_fusion.fuse.align import generic_prompts

    prompts = json.dumps(generic_prompts(("picture",)))
    assert not [one.name for one in question_types(FILE) if one.question in prompts]


def test_answers_must_fit_the_names(tmp_path: Path) -> None:
    file = tmp_path / "types.json"
    types = {"x": {"question": "?", "answers": ["a"]}}
    file.write_text(json.dumps({"names": ["zero", "one"], "shown": [0], "turn": "{digit} {question}", "types": types}))
    with pytest.raises(InputError, match="1 answers for 2 names"):
        question_types(file)
