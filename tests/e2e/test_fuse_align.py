"""`objective: align` in a recipe: no labels, and the LLM speaks of the expert in questions that no training asked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fuse_fixtures as toy
from fused_fixtures import build
from model_fusion.errors import InputError
from model_fusion.evaluate import trials
from model_fusion.evaluate.audit import AuditSettings, run_audit
from model_fusion.evaluate.tasks.examples import examples_task
from model_fusion.fuse import saving
from model_fusion.fuse.align import TRAINING as ALIGN
from model_fusion.fuse.align import train_by
from model_fusion.fuse.bridges import Gated, Prefix
from model_fusion.fuse.fit import Example
from model_fusion.recipe import fuse as recipes
from model_fusion.run.load import generate
from model_fusion.run.plan import make_plan

QUESTION = "The machine runs <|sensor|>. Is that bad?"
TINY = {"steps": 2, "batch_size": 4, "validate_every": 1, "seed": 0, "objective": "align", "prompts": []}


def unlabelled(folder: Path, **changes: Any) -> Path:
    """A recipe that aligns, on inputs alone."""
    file = toy.write_all(folder, objective="align", data="items.csv", **changes)
    rows = np.random.default_rng(3).uniform(0, 10, (40, 2)).round(1)
    (folder / "items.csv").write_text("sensor\n" + "".join(f"{a} {b}\n" for a, b in rows))
    return file


def test_without_labels_it_speaks_of_what_the_expert_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = unlabelled(tmp_path, training={}, bridge={"kind": "prefix", "tokens": 1, "codes": 16})
    assert toy.command(monkeypatch, "fuse", file, "-o", tmp_path / "out") == 0
    record = saving.read_config(tmp_path / "out")["task"]["training"]
    assert (record["objective"], record["prompts"]) == ("align", [])

    def said(item: str) -> str:
        asked = generate(tmp_path / "out", prompt=QUESTION, inputs=[f"sensor={item}"], max_new_tokens=5)
        return asked[0][1]

    assert "high" in said("9 9")
    assert "low" in said("1 1")


def test_what_aligning_takes_where_nothing_is_said(tmp_path: Path) -> None:
    unlabelled(tmp_path)
    data = toy.recipe(objective="align", data="items.csv", training={})
    del data["bridge"]
    plan = make_plan(recipes.load(toy.write_recipe(tmp_path, data)))
    assert plan.bridge == Prefix(tokens=1, codes=16)
    assert (plan.settings.batch_size, plan.settings.steps) == (ALIGN["batch_size"], ALIGN["steps"])
    data["objective"], data["data"] = "answers", "train.jsonl"
    assert make_plan(recipes.load(toy.write_recipe(tmp_path, data))).bridge == Gated()


def test_the_same_rows_are_no_examples_with_answers(tmp_path: Path) -> None:
    make_plan(recipes.load(unlabelled(tmp_path)))
    file = toy.write_recipe(tmp_path, toy.recipe(data="items.csv"))
    with pytest.raises(InputError, match="no prompt"):
        make_plan(recipes.load(file))


def test_own_prompts_join_the_generic_ones(tmp_path: Path) -> None:
    from model_fusion.run.fuse import _training

    file = toy.write_all(tmp_path, objective="align", bridge="prefix")
    plan = make_plan(recipes.load(file))
    assert _training(plan)["prompts"] == [toy.PROMPT]
    assert plan.settings.steps == 4


@pytest.mark.parametrize("name", ["im_end", "1st"])
def test_a_name_that_is_the_llms_own_token(name: str, tmp_path: Path) -> None:
    """Told before the data is read, or at the latest before the LLM is loaded."""
    toy.write_onnx(tmp_path / "expert.onnx")
    (tmp_path / "items.csv").write_text(f"{name}\n" + "1 2\n" * 5)
    data = toy.recipe(objective="align", data="items.csv", bridge="prefix")
    data["experts"] = {name: data["experts"]["sensor"]}
    with pytest.raises(InputError, match=f"expert name '{name}'"):
        make_plan(recipes.load(toy.write_recipe(tmp_path, data)))


def test_every_expert_needs_inputs(tmp_path: Path) -> None:
    unlabelled(tmp_path)
    data = toy.recipe(objective="align", data="items.csv", bridge="prefix")
    data["experts"]["other"] = data["experts"]["sensor"]
    with pytest.raises(InputError, match="no row has an input for expert 'other'"):
        make_plan(recipes.load(toy.write_recipe(tmp_path, data)))


def test_an_audit_trains_as_the_fusion_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = build("llama", Prefix(tokens=1, width=16), only="sign")
    expert = fused.experts["sign"]
    items = [x / 20 - 1 for x in range(40)]
    rows = [
        Example("hit or stick? <|sign|>", {"sign": x}, a) for x, a in zip(items, expert.describe(items), strict=True)
    ]
    task = examples_task(rows, fused.experts)
    fused.task = {"training": TINY}
    told: list[list[str]] = []
    align = type(fused).align

    def watched(self: Any, shown: Any, **options: Any) -> Any:
        told.append(self.experts["sign"].describe([item["sign"] for item in shown]))
        assert "objective" not in options
        return align(self, shown, **options)

    monkeypatch.setattr(type(fused), "align", watched)
    settings = AuditSettings(1, (), controls=("fused", "6", "9"))
    report = run_audit(fused, task, settings, journal=tmp_path / "j", progress=False)
    assert {row["control"] for row in report["rows"]} == {"fused", "6", "9"}
    # The raw input and the constant have no words of their own: the oracle is told the audited expert's.
    wanted = expert.describe([e.inputs["sign"] for e in task.train])
    assert told == [wanted] * 3
    # The check is red when an audit trains on answers whatever the fusion was trained on.
    told.clear()
    monkeypatch.setattr(
        trials, "train_by", lambda model, shown, held, training, **options: model.fit(shown, steps=2, **options)
    )
    run_audit(fused, task, settings, journal=tmp_path / "k", progress=False)
    assert told == []


def test_training_by_a_record_of_answers() -> None:
    fused = build("llama", Gated(layers=(0,), width=16), only="sign")
    rows = [Example("hit? <|sign|>", {"sign": x / 10}, "yes") for x in range(8)]
    record = json.loads(json.dumps({"steps": 2, "batch_size": 4, "keep_language": 0}))
    assert len(train_by(fused, rows, rows, record, progress=False).losses) == 2
