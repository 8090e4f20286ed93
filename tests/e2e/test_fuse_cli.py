"""The command line on the real embedded LLM: fuse, generate, chat through a pipe; killed, resumed, disk full."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fuse_fixtures as toy
from model_fusion.fuse import saving
from model_fusion.fuse.fit import AnswerStep

SOURCE = Path(__file__).parents[2] / "src"
COMMAND = [sys.executable, "-c", "from model_fusion.cli.main import main; main()"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fusion")
    training = {"steps": 60, "batch_size": 16, "target": [1.0, 0.05]}
    recipe = toy.write_all(folder, examples=80, bridge="gated", training=training, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        assert toy.command(patch, "fuse", recipe, "-o", folder / "out") == 0
    assert sorted(p.name for p in folder.iterdir()) == ["expert.onnx", "out", "recipe.yml", "train.jsonl"]
    return folder / "out"


def test_a_file_of_prompts_is_answered_with_the_experts_skill(
    fusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = toy.rows(20, seed=7)
    toy.write_rows(tmp_path / "asked.jsonl", asked)
    assert toy.command(monkeypatch, "generate", fusion, "--prompts", tmp_path / "asked.jsonl") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in asked]
    right = sum(got["answer"] == row["answer"] for got, row in zip(found, asked, strict=True))
    assert right >= 18
    # The plain LLM, which never sees the readings, gives every prompt the same answer.
    assert toy.command(monkeypatch, "generate", fusion, "--prompts", tmp_path / "asked.jsonl", "--bridge-off") == 0
    plain = {json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()}
    assert len(plain) == 1


def test_words_json_and_seeded_sampling(
    fusion: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert toy.command(monkeypatch, "generate", fusion, "--prompt", toy.PROMPT, *arguments) == 0
        return capsys.readouterr().out

    assert said("--input", "sensor=9 9.5") == said("--input", 'sensor={"left": 9, "right": 9.5}') == "high\n"
    warm = ("--input", "sensor=0.5 1", "--temperature", "5", "--max-new-tokens", "8", "--seed")
    assert said(*warm, "3") == said(*warm, "3") != said(*warm, "4")


def test_chat_through_a_pipe(fusion: Path) -> None:
    lines = [
        "/experts",
        toy.PROMPT,  # nothing set yet
        "/expert sensor 1 2",
        "Is the reading low or high?",  # gets the placeholder in front
        "/expert sensor 1 x",
        "/expret",
        "/reset",
        "/expert sensor [9, 8]",
        toy.PROMPT,
        "/reset",
        "/off",
        "What is the capital of France?",
        "/on",
        "/help",
        "/quit",
        "never read",
    ]
    done = subprocess.run(
        [*COMMAND, "chat", str(fusion), "--max-new-tokens", "12"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert out[0] == "<|sensor|> left (float), right (float): not set"
    assert out[1].endswith("(1.0, 2.0)")
    assert out[2] == "low"
    assert out[3:6] == ["the conversation starts afresh", "<|sensor|> left (float), right (float): (9.0, 8.0)", "high"]
    assert out[7] == "the bridge is off"
    assert "Paris" in out[8]
    assert "the bridge is on" in out
    assert out[-1] == "bye"
    errors = done.stderr.splitlines()
    assert len(errors) == 3
    assert "set it with /expert sensor VALUES" in errors[0]
    assert "right: expected a number, got 'x'; its input is left (float), right (float)" in errors[1]
    assert "unknown command /expret; did you mean '/expert'" in errors[2]


def bridge(folder: Path) -> bytes:
    return (folder / saving.WEIGHTS).read_bytes()


def test_killed_resumed_and_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"steps": 8, "batch_size": 4, "validate_every": 4, "patience": 0, "save_every_seconds": 0}
    recipe = toy.write_all(tmp_path, training=training)
    run = ["fuse", str(recipe), "-o"]
    state = tmp_path / ".killed.training" / "state.pt"
    process = subprocess.Popen([*COMMAND, *run, str(tmp_path / "killed")], env=ENVIRONMENT)
    while not state.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    assert toy.command(monkeypatch, *run, tmp_path / "killed") == 2
    assert "continue it with --resume" in capsys.readouterr().err
    assert toy.command(monkeypatch, *run, tmp_path / "killed", "--resume") == 0
    assert not state.parent.exists()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "save_file", full)
        capsys.readouterr()
        assert toy.command(patch, *run, tmp_path / "whole") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "the disk is full; free some space, then continue with --resume" in err
    assert not (tmp_path / "whole").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerStep, "forward", None)  # nothing is trained again
        assert toy.command(patch, *run, tmp_path / "whole", "--resume") == 0
    assert bridge(tmp_path / "whole") == bridge(tmp_path / "killed")
    # The check is red for a run that was not the same.
    other = toy.write_recipe(tmp_path, toy.recipe(training=training, seed=1))
    assert toy.command(monkeypatch, "fuse", other, "-o", tmp_path / "killed", "--overwrite") == 0
    assert bridge(tmp_path / "killed") != bridge(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


def test_a_bridge_without_training_and_a_conversation_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.write_all(tmp_path, bridge="logit", training={})
    assert toy.command(monkeypatch, "fuse", recipe, "-o", tmp_path / "out") == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}: the logit bridge has nothing to train\n"
    assert toy.command(monkeypatch, "generate", tmp_path / "out", "--prompt", toy.PROMPT, "--input", "sensor=9 9") == 0
    assert capsys.readouterr().out == "high\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("/expert sensor 1 1\nWhich?\n/expert sensor 9 9\nAnd now?\n"))
    assert toy.command(monkeypatch, "chat", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if "|" not in line] == ["low", "high"], said.err


def test_a_fusion_of_a_built_in_task_loads_without_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"task": "digits", "options": {"labels": 20}}
    training = {"steps": 1, "batch_size": 2}
    recipe = toy.write_recipe(tmp_path, {"data": data, "training": training, "keep_language": 0.5, "dtype": "float32"})
    assert toy.command(monkeypatch, "fuse", recipe, "-o", tmp_path / "out") == 0
    config = saving.read_config(tmp_path / "out")
    assert config["task"]["name"] == "digits"
    assert config["task"]["options"] == {"seed": 0, "labels": 20}
    assert config["task"]["training"]["keep_language"] == 0.5  # an audit trains its variants in the same way
    assert config["task"]["training"]["steps"] == 1
    capsys.readouterr()
    picture = json.dumps([[float(i)] * 8 for i in range(8)])
    question = ("--prompt", "Which digit is in the picture? <|picture|>", "--input", f"picture={picture}")
    assert toy.command(monkeypatch, "generate", tmp_path / "out", *question, "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out.strip()
