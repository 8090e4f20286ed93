"""`model-fusion audit out/` on a small saved fusion: files, resuming, and one line for what the user can mend."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from model_fusion.cli.main import main
from model_fusion.errors import InputError
from model_fusion.evaluate.controls import TOLD
from model_fusion.evaluate.saved import load_for_audit
from model_fusion.fuse.bridges import Gated
from model_fusion.fuse.experts import Expert, Field, InputSchema
from model_fusion.fuse.model import FusedModel
from tiny_llm import tiny_llama, word_tokenizer

PROMPT = "Which kind is it? <|sample|>"
CLASSES = ("low", "middle", "high")
TRAINING = {"steps": 60, "batch_size": 16, "learning_rate": 0.01, "target": (1.0, 0.05)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved fusion of a scikit-learn classifier, and examples.jsonl beside it."""
    root = tmp_path_factory.mktemp("audit")
    tokenizer = word_tokenizer([PROMPT, *TOLD.values(), *CLASSES])
    tiny_llama(tokenizer).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    x = np.random.default_rng(0).uniform(-1, 1, (60, 2))
    kind = np.digitize(x[:, 0], [-0.3, 0.3])
    schema = InputSchema((Field("a", "float"), Field("b", "float")))
    expert = Expert.from_sklearn(LogisticRegression(C=100).fit(x, kind), schema, classes=CLASSES)
    rows = [tuple(float(v) for v in row) for row in x]
    examples = [
        {"prompt": PROMPT, "inputs": {"sample": row}, "answer": said}
        for row, said in zip(rows, expert.describe(rows), strict=True)
    ]
    (root / "examples.jsonl").write_text("\n".join(json.dumps(example) for example in examples))
    fused = FusedModel.build(root / "base", experts={"sample": expert}, bridge=Gated(layers=(1,), width=32))
    fused.task = {"training": TRAINING}
    fused.save_pretrained(root / "out")
    return root


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The exit code of `model-fusion audit ...`."""
    monkeypatch.setattr(sys, "argv", ["model-fusion", "audit", *map(str, words)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_audits_a_saved_fusion(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--examples", folder / "examples.jsonl", "--json", folder / "a.json", "--html", folder / "a.html")
    assert command(monkeypatch, folder / "out", *files, "--quick", "--seeds", "2") == 0
    printed = capsys.readouterr().out
    assert "QUICK LOOK, 2 seeds" in printed
    report = json.loads((folder / "a.json").read_text())
    assert report["seeds"]["quick"] is True
    assert report["versions"]["torch"]
    assert {row["control"] for row in report["rows"]} >= {"fused", "1", "4a", "6", "8", "10", "11", "12"}
    (fused,) = (row for row in report["rows"] if row["control"] == "fused" and row["labels"] is None)
    assert fused["scores"]["agreement"]["mean"] >= 0.7
    text = (folder / "a.html").read_text()
    assert "<svg" in text
    assert "QUICK LOOK" in text
    # Every cell is kept: going on runs nothing and says the same.
    journal = (folder / "out" / "audit.journal.jsonl").read_text()
    assert command(monkeypatch, folder / "out", *files, "--quick", "--resume") == 0
    assert json.loads((folder / "a.json").read_text())["rows"] == report["rows"]
    assert (folder / "out" / "audit.journal.jsonl").read_text() == journal


def test_a_pickled_expert_is_read_with_permission_only(folder: Path, tmp_path: Path) -> None:
    rows = load_for_audit(folder / "out", examples=folder / "examples.jsonl")[1].train
    x = np.array([row.inputs["sample"] for row in rows])
    schema = InputSchema((Field("a", "float"), Field("b", "float")))
    fitted = LogisticRegression().fit(x, [row.answer for row in rows])
    expert = Expert.from_sklearn(fitted, schema, save_as="joblib")
    fused = FusedModel.build(folder / "base", experts={"sample": expert}, bridge=Gated(layers=(1,), width=32))
    fused.save_pretrained(tmp_path / "out")
    with pytest.raises(InputError, match="allow_pickle"):
        load_for_audit(tmp_path / "out", examples=folder / "examples.jsonl")
    with pytest.warns(UserWarning, match="runs whatever code"):
        opened, _ = load_for_audit(tmp_path / "out", examples=folder / "examples.jsonl", allow_pickle=True)
    assert opened.experts["sample"].describe([(0.9, 0)]) == expert.describe([(0.9, 0)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "records no task: name one with --task, or give your own --examples"),
        (("--task", "poker"), "unknown task 'poker'"),
        (("--task", "digits", "--examples", "x.jsonl"), "either a task or examples, not both"),
        (("--examples", "missing.jsonl"), "missing.jsonl"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    assert command(monkeypatch, folder / "out", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_fusion_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, tmp_path, "--task", "digits") == 2
    assert "no fusion_config.json here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
