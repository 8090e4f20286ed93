"""A search from recipe to merged folder, where the best weights are known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import model_fusion as mf
from model_fusion.checkpoint.statistics import Statistics
from model_fusion.checkpoint.verify import verify
from model_fusion.errors import InputError
from model_fusion.search.held_out import TestSet
from search_fixtures import BEST, RECIPE, closeness, write


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def data(room: Path, name: str) -> dict[str, Any]:
    return {**load_file(room / "base.safetensors"), "name": torch.tensor([ord(letter) for letter in name])}


def run(room: Path, output: str = "out", **changes: Any) -> Any:
    settings = {"metric": closeness, "validation": data(room, "validation"), "test": data(room, "test")}
    return mf.search(room / "recipe.yml", room / output, **{"trials": 60, **settings, **changes})


@pytest.mark.parametrize("sampler", ["cmaes", "tpe", "grid", "random"])
def test_every_sampler_nears_the_best_weights(room: Path, sampler: str) -> None:
    found = run(room, sampler=sampler)
    values = found.report["winner"]["values"]
    far = 0.2 if sampler == "random" else 0.1
    assert abs(values["wa"] - BEST[0]) < far
    assert abs(values["wb"] - BEST[1]) < far
    assert found.report["test"]["gain"] > 0
    assert "gains" in found.report["sentence"]


def test_the_output_is_the_best_recipe_merged_and_its_lineage_knows_the_search(room: Path) -> None:
    found = run(room)
    values = found.report["winner"]["values"]
    parts = [load_file(room / f"{name}.safetensors")["w"].double() for name in ("base", "a", "b")]
    exact = parts[0] + values["wa"] * (parts[1] - parts[0]) + values["wb"] * (parts[2] - parts[0])
    assert torch.allclose(load_file(room / "out/model.safetensors")["w"].double(), exact, atol=1e-6)
    verify(room / "out")
    lineage = json.loads((room / "out/model_fusion.json").read_text())
    assert found.report["sentence"] in lineage["notes"]
    assert {"search.json", "recipe.yml"} <= set(lineage["files"])
    assert found.report["sentence"] in (room / "out/README.md").read_text()
    mf.merge(room / "out/recipe.yml", room / "again")
    assert (room / "again/model.safetensors").read_bytes() == (room / "out/model.safetensors").read_bytes()
    assert not list(room.glob(".out*")), "the study's folder is left"


def test_recipe_yml_finds_its_models_from_anywhere(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(room, trials=3)
    elsewhere = room / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    mf.merge(room / "out/recipe.yml", room / "again")
    recipe = yaml.safe_load((room / "out/recipe.yml").read_text())
    assert not Path(recipe["base_model"]).is_absolute()


def test_recipe_yml_finds_its_statistics_from_anywhere(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        Statistics("gram", {"w": torch.eye(4)}, 4).save(room / f"{name}.gram.safetensors")
    models = [{"model": f"{name}.safetensors", "statistics": f"{name}.gram.safetensors"} for name in "ab"]
    recipe = {"merge_method": "regmean", "models": models, "parameters": {"alpha": {"range": [0.1, 0.9]}}}
    (room / "data.yml").write_text(yaml.safe_dump(recipe))
    mf.search(
        room / "data.yml",
        room / "out",
        metric=closeness,
        validation=data(room, "one"),
        test=data(room, "two"),
        trials=2,
    )
    (room / "elsewhere").mkdir()
    monkeypatch.chdir(room / "elsewhere")
    mf.merge(room / "out/recipe.yml", room / "again")
    assert (room / "again/model.safetensors").read_bytes() == (room / "out/model.safetensors").read_bytes()


def test_plain_task_arithmetic_stands_beside_the_winner_and_can_win(room: Path) -> None:
    def prefers_halves(merged: Mapping[str, Tensor], content: Mapping[str, Tensor]) -> float:
        change = merged["w"] - content["w"]
        return -float((change[0, 0] - 0.3) ** 2 + (change[3, 3] - 0.3) ** 2)

    found = run(room, metric=prefers_halves, sampler="random", trials=3)
    assert [cell["lambda"] for cell in found.report["task_arithmetic"]["grid"]] == [k / 10 for k in range(1, 11)]
    assert found.report["winner"]["kind"] == "task_arithmetic"
    assert found.report["winner"]["values"] == {"lambda": 0.3}
    assert found.report["test"]["gain"] == 0
    merged = load_file(room / "out/model.safetensors")["w"] - load_file(room / "base.safetensors")["w"]
    assert torch.allclose(merged, torch.full((4, 4), 0.3), atol=1e-6)


class Spy:
    """A test set that says when it is opened; and a metric that counts what it judges, in order."""

    def __init__(self, room: Path) -> None:
        self.room, self.events = room, list[str]()

    def test(self) -> dict[str, Any]:
        self.events.append("opened")
        return data(self.room, "test")

    def metric(self, merged: Mapping[str, Tensor], content: Mapping[str, Tensor]) -> float:
        name = "".join(map(chr, content["name"].tolist()))
        self.events.append(name)
        return closeness(merged, content)


def check_shut(events: list[str], trials: int) -> None:
    """The test set is opened once, after every trial, and judges the winner and plain task arithmetic."""
    assert events == ["validation"] * (10 + trials) + ["opened", "test", "test"]


def test_the_test_set_is_opened_once_and_last(room: Path) -> None:
    spy = Spy(room)
    found = run(room, metric=spy.metric, test=spy.test, trials=7)
    check_shut(spy.events, 7)
    assert found.report["test"]["reads"] == 1
    assert not found.report["test"]["re_read"]


def test_mutation_a_search_that_peeks_is_caught(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(room)
    start = TestSet.__init__

    def peeking(self: TestSet, *arguments: Any) -> None:
        start(self, *arguments)
        self._data()

    monkeypatch.setattr(TestSet, "__init__", peeking)
    run(room, metric=spy.metric, test=spy.test, trials=7)
    with pytest.raises(AssertionError):
        check_shut(spy.events, 7)


class Killed(BaseException):
    pass


def interrupted(room: Path, after: int, **changes: Any) -> int:
    """Kill a search in its judgement number `after`; returns how many were judged."""
    count = 0

    def metric(merged: Mapping[str, Tensor], content: Mapping[str, Tensor]) -> float:
        nonlocal count
        count += 1
        if count > after:
            raise Killed
        return closeness(merged, content)

    metric.__qualname__ = closeness.__qualname__
    with pytest.raises(Killed):
        run(room, metric=metric, **changes)
    assert not (room / "out").exists()
    return count


@pytest.mark.parametrize(
    ("sampler", "after", "trials"),
    [("cmaes", 50, 50), ("tpe", 4, 20), ("tpe", 10, 20), ("tpe", 23, 20), ("grid", 23, 20), ("random", 23, 20)],
)
def test_an_interrupted_search_resumes_to_the_same_result(room: Path, sampler: str, after: int, trials: int) -> None:
    whole = run(room, "whole", sampler=sampler, trials=trials)
    interrupted(room, after, sampler=sampler, trials=trials)
    resumed = run(room, sampler=sampler, trials=trials, resume=True)
    assert resumed.report == whole.report
    assert (room / "out/model.safetensors").read_bytes() == (room / "whole/model.safetensors").read_bytes()


def test_a_search_killed_while_it_reads_the_test_set_counts_a_second_reading(room: Path) -> None:
    interrupted(room, 10 + 5 + 1, trials=5)
    with pytest.raises(InputError, match="test set of this search was read already"):
        run(room, trials=6, resume=True)
    found = run(room, trials=5, resume=True)
    assert found.report["test"]["reads"] == 2
    assert "RE-READ" in found.report["sentence"]


def test_a_second_search_on_one_test_set_is_refused_or_marked(room: Path) -> None:
    run(room, trials=3)
    with pytest.raises(InputError, match="its test set was read"):
        run(room, trials=3)
    with pytest.raises(InputError, match="its test set was read"):
        run(room, trials=3, resume=True)
    again = run(room, trials=3, overwrite=True)
    assert again.report["test"]["reads"] == 2
    assert "RE-READ" in again.report["sentence"]
    fresh = run(room, trials=3, overwrite=True, test=data(room, "another"))
    assert fresh.report["test"]["reads"] == 1


def test_another_recipe_or_seed_is_refused_on_resume(room: Path) -> None:
    interrupted(room, 12)
    with pytest.raises(InputError, match="unfinished search"):
        run(room)
    with pytest.raises(InputError, match="another seed"):
        run(room, seed=1, resume=True)
    (room / "recipe.yml").write_text((room / "recipe.yml").read_text().replace("[0, 1], name: wb", "[0, 2], name: wb"))
    with pytest.raises(InputError, match="another recipe"):
        run(room, resume=True)


def test_a_changed_model_is_refused_on_resume(room: Path) -> None:
    interrupted(room, 12)
    (room / "b.safetensors").write_bytes((room / "a.safetensors").read_bytes())
    with pytest.raises(InputError, match="another models"):
        run(room, resume=True)


def test_more_trials_go_on_with_an_interrupted_search(room: Path) -> None:
    interrupted(room, 15, trials=20)
    assert len(run(room, trials=30, resume=True).report["trials"]) == 30


def test_a_trial_without_a_score_is_kept_and_the_search_goes_on(room: Path) -> None:
    def picky(merged: Mapping[str, Tensor], content: Mapping[str, Tensor]) -> float:
        score = closeness(merged, content)
        return float("nan") if score < -0.2 else score

    found = run(room, metric=picky, sampler="random", trials=20)
    failures = [trial["failure"] for trial in found.report["trials"] if trial["score"] is None]
    assert failures
    assert set(failures) == {"the score is nan"}
    assert found.report["winner"]["score"] > -0.2


def test_no_candidate_with_a_score_is_one_line(room: Path) -> None:
    with pytest.raises(InputError, match="no candidate has a score; the first failed with: the score is nan"):
        run(room, metric=lambda merged, content: float("nan"), trials=2)


def test_a_recipe_without_a_base_is_compared_with_the_mean(room: Path) -> None:
    recipe = {**RECIPE, "merge_method": "linear"}
    del recipe["base_model"]
    found = mf.search(
        recipe,
        "out",
        metric=closeness,
        validation=data(room, "v"),
        test=data(room, "t"),
        trials=3,
        direction="minimize",
    )
    assert [cell["lambda"] for cell in found.report["task_arithmetic"]["grid"]] == [0.5]
    named = mf.search(
        recipe, "based", metric=closeness, validation=data(room, "v"), test=data(room, "t"), trials=3,
        base="base.safetensors",
    )  # fmt: skip
    assert len(named.report["task_arithmetic"]["grid"]) == 10
