"""An answer in a sentence is read as well as a bare one, and an answer that says two things is none."""

import pytest

from model_fusion.evaluate.tasks.examples import examples_task
from model_fusion.evaluate.tasks.reading import Reading, number, one_of, plain, reading_of
from model_fusion.fuse.experts import Expert, Field, InputSchema
from model_fusion.fuse.fit import Example

SCHEMA = InputSchema((Field("pressure", "float"), Field("leaking", "bool")))
PROMPT = "How does it run? <|machine|>"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("high", "high"),
        (" High. ", "high"),
        ("The machine runs high.", "high"),
        ("It is not low.", "not low"),
        ("low or high", None),
        ("highly", None),
        ("", None),
    ],
)
def test_the_one_known_answer(text: str, said: str | None) -> None:
    assert one_of(["low", "High", "not low"])(text) == said


def test_known_numbers_are_whole_numbers() -> None:
    read = one_of(["5", "10"])
    assert [read(text) for text in ("5", "it is 5.", "-5", "10.5", "15", "5 or 10")] == [
        "5",
        "5",
        None,
        None,
        None,
        None,
    ]


def test_how_answers_are_read_follows_from_them() -> None:
    few = reading_of(["low", "high"] * 10, ["middle"])
    assert few.read("it is middle") == "middle"
    assert not few.numbers
    assert reading_of([str(i / 4) for i in range(50)]).read("about 7.25 bar") == 7.25
    assert reading_of([str(i % 10) for i in range(50)]).read("3.") == "3"  # ten digits are names
    free = reading_of([f"part {i} is worn" for i in range(50)])
    assert free.read("Part 3 is worn.") == "part 3 is worn"
    assert free.label == "exact match"


def machine() -> Expert:
    return Expert.from_callable(
        lambda items: [[0.9, 0.1] if item[0] > 5 else [0.1, 0.9] for item in items], SCHEMA, classes=("high", "low")
    )


def rows() -> list[Example]:
    items = [(i / 3, i % 2 == 0) for i in range(30)]
    return [Example(PROMPT, {"machine": x}, said) for x, said in zip(items, machine().describe(items), strict=True)]


def test_a_told_llm_that_answers_in_a_sentence_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def agreement() -> float:
        task = examples_task(rows(), {"machine": machine()})
        return task.score_examples(task.test, [f"It runs {e.answer} now." for e in task.test])["agreement"]

    assert agreement() == 1.0
    # The check is red when answers must be equal to the letter: every told LLM would score 0.
    exactly = Reading("exact match", plain)
    monkeypatch.setattr("model_fusion.evaluate.tasks.examples.reading_of", lambda *given: exactly)
    assert agreement() == 0.0


def test_numbers_are_judged_by_their_distance() -> None:
    expert = Expert.from_callable(lambda items: [item[0] for item in items], SCHEMA, output="value")
    items = [(10 + i / 2, False) for i in range(60)]
    task = examples_task([Example(PROMPT, {"machine": x}, f"{x[0]}") for x in items], {"machine": expert})
    told = [f"about {float(e.answer) + 0.1:.1f} bar" for e in task.test]
    scores = task.score_examples(task.test, told)
    assert scores["error"] == pytest.approx(0.1)
    assert scores["agreement"] == 1.0
    silent = task.score_examples(task.test, ["no idea"] * len(told))
    assert silent["parsed"] == 0.0
    assert silent["error"] > 1
    assert (task.metric.name, task.metric.higher_is_better) == ("error", False)
    # Control 12: the same regressor turned over, judged by its own values.
    (other,) = (make() for make in task.exchanged.values())
    retold, low = task.retold(other), min(task.test, key=lambda e: float(e.answer))
    assert retold.score_examples(task.test, other.describe([e.inputs["machine"] for e in task.test]))["agreement"] == 1
    assert float(other.describe([low.inputs["machine"]])[0]) == max(float(e.answer) for e in task.test)


def test_the_input_is_told_by_its_fields_names() -> None:
    task = examples_task(rows(), {"machine": machine()})
    assert task.in_words((8.5, True)) == "pressure 8.5, leaking yes"
    picture = InputSchema((Field("ink", "array", shape=(2, 2)),))
    assert picture.words(picture.check([[0, 1], [2, 3.5]])) == "ink 0 1; 2 3.5"


def test_one_number_or_none() -> None:
    assert [number(text) for text in ("-3.5", "it is 12.", "1 or 2", "none")] == [-3.5, 12.0, None, None]
