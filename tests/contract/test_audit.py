"""Every control runs on a tiny random Llama, and each one turns red when what it guards is broken."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_fusion.errors import InputError, IntegrityError, MissingDependencyError
from model_fusion.evaluate import audit as auditing
from model_fusion.evaluate import controls
from model_fusion.evaluate.audit import AuditSettings, audit, run_audit
from model_fusion.evaluate.controls import CONTROLS, TOLD, NotApplicable, shuffle, swap
from model_fusion.evaluate.language import UNRELATED_PROMPTS
from model_fusion.evaluate.tasks.base import Metric, Task
from model_fusion.evaluate.tasks.examples import examples_task
from model_fusion.evaluate.tasks.exchanged import permuted, rule
from model_fusion.evaluate.trials import Trials
from model_fusion.fuse.bridges import Gated, Logit, Lora, Prefix
from model_fusion.fuse.experts import ClassDecision, Expert, Field, InputSchema
from model_fusion.fuse.fit import Example
from model_fusion.fuse.model import FusedModel
from tiny_llm import tiny_llama, word_tokenizer

SCHEMA = InputSchema((Field("x", "float"),))
CLASSES = ("stick", "hit")
PROMPT = "Should I hit or stick? The table: <|table|>"
TRAINING = {"steps": 60, "batch_size": 16, "learning_rate": 0.01, "target": (1.0, 0.05)}


def probabilities(items: list[float]) -> np.ndarray:
    hit = 1 / (1 + np.exp(-8 * np.asarray(items)))
    return np.stack([1 - hit, hit], axis=1)


def noise(seed: int) -> Expert:
    """Numbers that have nothing to do with the input's sign."""

    def unread(items: list[float]) -> np.ndarray:
        hit = np.array([np.random.default_rng([seed, int(abs(x) * 1e6)]).uniform(0.01, 0.99) for x in items])
        return np.stack([1 - hit, hit], axis=1)

    return Expert.from_callable(unread, SCHEMA, classes=CLASSES)


def coin_task(expert: Expert) -> Task:
    """Hit where x > 0. The raw input tells it all, so control 6 should succeed here."""
    xs = [float(x) for x in np.random.default_rng(0).uniform(-1, 1, 70)]

    def decided(items: Sequence[float]) -> list[str]:
        found = expert.decide(items)
        assert isinstance(found, ClassDecision)
        return [CLASSES[i] for i in found.log_probs.argmax(1).tolist()]

    examples = [Example(PROMPT, {"table": x}, answer) for x, answer in zip(xs, decided(xs), strict=True)]

    def parse(text: str) -> str | None:
        first = text.split()[:1]
        return first[0] if first and first[0] in CLASSES else None

    def score(items: Sequence[Any], texts: Sequence[str]) -> dict[str, float]:
        share = float(np.mean([parse(t) == w for t, w in zip(texts, decided(items), strict=True)]))
        return {"agreement": share, "points": share}

    return Task(
        name="coin",
        expert_name="table",
        expert=expert,
        prompt=PROMPT,
        paraphrases=("<|table|> Hit or stick?",),
        train=tuple(examples[:32]),
        validation=tuple(examples[32:40]),
        test=tuple(examples[40:]),
        all_inputs=tuple(xs),
        parse=parse,
        score=score,
        in_words=lambda item: f"x is {item}",
        metric=Metric("points", "points"),
        retold=coin_task,
        untrained=noise,
        exchanged={
            "exchanged": lambda: permuted(expert, (1, 0)),
            "far only": lambda: rule(expert, lambda x: "hit" if abs(x) > 0.5 else "stick"),
        },
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer([PROMPT, *TOLD.values(), *UNRELATED_PROMPTS, *CLASSES])


def build(tokenizer: Any, bridge: Any) -> tuple[FusedModel, Task]:
    task = coin_task(Expert.from_callable(probabilities, SCHEMA, classes=CLASSES))
    fused = FusedModel.build(tiny_llama(tokenizer), tokenizer=tokenizer, experts={"table": task.expert}, bridge=bridge)
    fused.fit(task.train, validation=task.validation, progress=False, **TRAINING)
    fused.task = {"training": {k: v for k, v in TRAINING.items()}}
    return fused, task


@pytest.fixture(scope="module")
def gated(tokenizer: Any) -> tuple[FusedModel, Task]:
    return build(tokenizer, Gated(layers=(1,), width=32))


@pytest.fixture(scope="module")
def report(gated: tuple[FusedModel, Task], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    journal = tmp_path_factory.mktemp("audit") / "journal.jsonl"
    return run_audit(*gated, AuditSettings(2, (16,)), journal=journal, progress=False)


def mean(report: dict[str, Any], control: str, score: str = "agreement") -> float:
    return float(next(r for r in report["rows"] if r["control"] == control)["scores"][score]["mean"])


def test_every_control_is_there(report: dict[str, Any]) -> None:
    assert {row["control"] for row in report["rows"]} == set(CONTROLS)
    assert {str(n) for n in (1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12)} | {"4a", "4b", "4c"} <= set(CONTROLS)
    assert not report["skipped"]
    assert len([row for row in report["rows"] if row["control"] == "12"]) == 2
    assert {row["labels"] for row in report["rows"] if row["control"] == "5"} == {None, 16}
    assert json.loads(json.dumps(report)) == report
    rows = {row["control"]: row["scores"]["points"]["mean"] for row in report["rows"] if not row["variant"]}
    expected = (mean(report, "fused", "points") - rows["2"]) / (rows["1"] - rows["2"])
    assert report["skill_recovered"] == pytest.approx(expected)


def test_the_controls_say_what_they_should(report: dict[str, Any]) -> None:
    assert mean(report, "1") == 1.0
    assert mean(report, "fused") >= 0.9
    assert mean(report, "saved") >= 0.9
    assert mean(report, "4a") < 0.8
    assert mean(report, "4b") < 0.8
    assert mean(report, "4b", "follows") >= 0.9
    assert mean(report, "4c") < 0.2
    assert mean(report, "4c", "follows") >= 0.9
    assert mean(report, "5") < 0.8
    assert mean(report, "6") >= 0.8  # the raw input does tell it here, and the audit must show that
    assert mean(report, "7") >= 0.9
    assert mean(report, "9") < 0.8
    assert mean(report, "11") >= 0.9
    assert all(row["scores"]["agreement"]["mean"] >= 0.85 for row in report["rows"] if row["control"] == "12")


def test_differences_are_paired_with_the_same_seed_and_labels(report: dict[str, Any]) -> None:
    rows = {(row["control"], row["labels"]): row for row in report["rows"] if not row["variant"]}
    for control, labels in (("5", None), ("5", 16), ("4b", None)):
        fused, other = rows["fused", labels]["by_seed"], rows[control, labels]["by_seed"]
        expected = np.mean([fused[s]["points"] - other[s]["points"] for s in ("0", "1")])
        assert rows[control, labels]["difference"]["points"]["mean"] == pytest.approx(expected)
        assert rows[control, labels]["difference"]["points"]["n"] == 2


def once(gated: tuple[FusedModel, Task], key: str) -> list[dict[str, float]]:
    trials = Trials(*gated, TRAINING)
    try:
        return [outcome.scores for outcome in CONTROLS[key].run(trials, 0, None)]
    finally:
        trials.close()


def test_a_shuffle_that_does_not_shuffle_is_seen(
    gated: tuple[FusedModel, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controls, "shuffle", lambda count, seed: list(range(count)))
    assert not once(gated, "4b")[0]["agreement"] < 0.8


def test_a_signal_that_is_not_zeroed_is_seen(gated: tuple[FusedModel, Task], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "constant", lambda expert, value: expert)
    assert not once(gated, "4a")[0]["agreement"] < 0.8


def test_scoring_the_exchanged_expert_by_the_old_one_is_seen(gated: tuple[FusedModel, Task]) -> None:
    fused, task = gated
    wrong = replace(task, retold=lambda other: task)
    assert not all(scores["agreement"] >= 0.85 for scores in once((fused, wrong), "12"))


def test_a_refitted_normaliser_would_hide_nothing(gated: tuple[FusedModel, Task]) -> None:
    """The exchanged expert is read through the normaliser that training fitted."""
    trials = Trials(*gated, TRAINING)
    try:
        model = trials.main(0)
        before = model.normalisers["table"].mean.clone()
        CONTROLS["12"].run(trials, 0, None)
        assert torch.equal(model.normalisers["table"].mean, before)
    finally:
        trials.close()


def test_an_audit_leaves_the_fusion_as_it_was(gated: tuple[FusedModel, Task], report: dict[str, Any]) -> None:
    fused, task = gated
    assert list(fused.fusions) == ["default"]
    assert fused.active == "default"
    texts = fused.answer([q.prompt for q in task.questions()], [q.inputs for q in task.questions()])
    assert task.score(task.all_inputs, texts)["points"] == pytest.approx(mean(report, "saved", "points"))


def test_shuffle_and_swap() -> None:
    assert sorted(shuffle(50, 1)) == list(range(50))
    assert shuffle(50, 1) != shuffle(50, 2)
    decided = ["a", "b", "a", "a"]
    assert all(decided[j] != decided[i] for i, j in enumerate(swap(decided, 3)))
    # Evenly: a row beside a border between decisions is drawn no more often than others.
    rows = swap(["a"] * 400 + ["b"] * 20, 0)
    assert max(rows[:400].count(i) for i in range(400, 420)) < 50
    with pytest.raises(NotApplicable):
        swap(["a", "a"], 0)


def test_an_interrupted_audit_goes_on(
    gated: tuple[FusedModel, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = AuditSettings(1, (), controls=("fused", "saved", "1", "4b", "11"))
    whole = run_audit(*gated, settings, journal=tmp_path / "whole", progress=False)
    ran: list[str] = []
    real = auditing._run

    def dying(trials: Trials, cell: auditing.Cell) -> dict[str, Any]:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(cell.key)
        return real(trials, cell)

    monkeypatch.setattr(auditing, "_run", dying)
    with pytest.raises(KeyboardInterrupt):
        run_audit(*gated, settings, journal=tmp_path / "cut", progress=False)
    with (tmp_path / "cut").open("a") as file:
        file.write('{"key": "half')  # the line that a kill cuts off
    again: list[str] = []
    monkeypatch.setattr(auditing, "_run", lambda trials, cell: (again.append(cell.key), real(trials, cell))[1])
    resumed = run_audit(*gated, settings, journal=tmp_path / "cut", resume=True, progress=False)
    assert resumed["rows"] == whole["rows"]
    assert not set(again) & set(ran)


def test_a_journal_of_another_audit_is_refused(gated: tuple[FusedModel, Task], tmp_path: Path) -> None:
    fused, task = gated
    settings = AuditSettings(1, (), controls=("1",))
    run_audit(fused, task, settings, journal=tmp_path / "j", progress=False)
    with pytest.raises(IntegrityError, match="another fusion, task or setting"):
        run_audit(fused, replace(task, train=task.train[::-1]), settings, journal=tmp_path / "j", resume=True)


def test_finished_cells_are_not_thrown_away_by_mistake(gated: tuple[FusedModel, Task], tmp_path: Path) -> None:
    fused, task = gated
    journal, settings = tmp_path / "a.json.journal.jsonl", AuditSettings(1, (), controls=("1",))
    run_audit(fused, task, settings, journal=journal, progress=False)
    kept = journal.read_text()
    with pytest.raises(InputError, match=r"holds 2 finished cells of an audit: go on with --resume"):
        audit(fused, task=task, json_file=tmp_path / "a.json", progress=False)
    assert journal.read_text() == kept


@pytest.mark.parametrize("wrong", [{"json_file": "none/a.json"}, {"html_file": "none/a.html"}, {"html_file": "."}])
def test_where_nothing_can_be_written_is_told_first(
    wrong: dict[str, str], gated: tuple[FusedModel, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: Any, **options: Any) -> None:
        raise AssertionError("the audit ran")

    monkeypatch.setattr(auditing, "run_audit", run)
    fused, task = gated
    files = {key: tmp_path / value for key, value in wrong.items()}
    with pytest.raises(InputError, match="name a file"):
        audit(fused, task=task, journal=tmp_path / "j", **files)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="needs matplotlib"):
        audit(fused, task=task, journal=tmp_path / "j", html_file=tmp_path / "a.html")
    with pytest.raises(AssertionError, match="the audit ran"):  # what is right does run
        audit(fused, task=task, journal=tmp_path / "j", json_file=tmp_path / "a.json")


def test_the_signal_is_taken_from_the_fusion_of_few_labels_too(
    gated: tuple[FusedModel, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, task = gated
    fitted: list[int | None] = []
    fit = Trials.fit

    def watched(self: Trials, model: FusedModel, seed: int, labels: int | None = None) -> None:
        fitted.append(labels)
        fit(self, model, seed, labels)

    monkeypatch.setattr(Trials, "fit", watched)
    settings = AuditSettings(1, (32,), controls=("fused", "4a", "4b", "4c"))
    found = run_audit(fused, task, settings, journal=tmp_path / "j", progress=False)
    labels = {key: {r["labels"] for r in found["rows"] if r["control"] == key} for key in ("fused", "4a", "4b", "4c")}
    assert set(map(frozenset, labels.values())) == {frozenset({None, 32})}
    assert fitted == [None, 32]  # each once
    few = {r["control"]: r for r in found["rows"] if r["labels"] == 32}
    assert few["4a"]["difference"]["points"]["mean"] == pytest.approx(
        few["fused"]["by_seed"]["0"]["points"] - few["4a"]["by_seed"]["0"]["points"]
    )
    # The check is red when the fusion of all labels answers for that of few.
    main = Trials.main
    monkeypatch.setattr(Trials, "main", lambda self, seed, labels=None: main(self, seed))
    fitted.clear()
    run_audit(fused, task, settings, journal=tmp_path / "k", progress=False)
    assert fitted == [None]


@pytest.mark.parametrize("bridge", [Prefix(tokens=2, width=32), Lora(tokens=2, width=32)], ids=lambda b: b.kind)
def test_other_bridges(tokenizer: Any, bridge: Any, tmp_path: Path) -> None:
    fused, task = build(tokenizer, bridge)
    settings = AuditSettings(1, (), controls=("fused", "saved", "2", "4a", "4c", "6", "12"))
    found = run_audit(fused, task, settings, journal=tmp_path / "j", progress=False)
    # Seed 0 trains what was saved: the adapters of other trials must not have been left on.
    rows = {row["control"]: row["by_seed"]["0"] for row in found["rows"]}
    assert rows["fused"] == rows["saved"]


def test_what_cannot_be_audited_is_named(gated: tuple[FusedModel, Task], tokenizer: Any, tmp_path: Path) -> None:
    fused, task = gated
    untrained = FusedModel.build(fused.base, tokenizer=tokenizer, experts={"table": task.expert}, bridge=Logit())
    with pytest.raises(InputError, match="trains nothing"):
        run_audit(untrained, task, AuditSettings(1), journal=tmp_path / "j")
    with pytest.raises(InputError, match="asks expert 'other'"):
        run_audit(fused, replace(task, expert_name="other"), AuditSettings(1), journal=tmp_path / "j")
    with pytest.raises(InputError, match="unknown control '99'"):
        AuditSettings(1, controls=("99",))
    with pytest.raises(InputError, match="records no task"):
        audit(fused)


def test_own_examples(gated: tuple[FusedModel, Task], tmp_path: Path) -> None:
    fused, task = gated
    rows = [{"prompt": e.prompt, "inputs": e.inputs, "answer": e.answer} for e in (*task.train, *task.test)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    found = audit(fused, examples=file, quick=True, seeds=1, json_file=tmp_path / "a.json", progress=False)
    assert mean(found, "fused") >= 0.8
    assert [s["control"] for s in found["skipped"]] == ["5"]
    assert mean(found, "12") >= 0.8
    assert json.loads((tmp_path / "a.json").read_text())["claims"] == found["claims"]
    assert all(c["supported"] is not True or "seeds" not in c["because"] for c in found["claims"])


def test_too_few_examples(gated: tuple[FusedModel, Task]) -> None:
    with pytest.raises(InputError, match="at least 10"):
        examples_task([Example(PROMPT, {"table": 0.1}, "hit")] * 3, gated[0].experts)
    with pytest.raises(InputError, match="once in its prompt"):
        examples_task([Example(PROMPT * 2, {"table": [0.1, 0.2]}, "hit")] * 12, gated[0].experts)
    with pytest.raises(InputError, match="none of the experts table"):
        examples_task([Example(PROMPT, {}, "hit")] * 12, gated[0].experts)
