"""`model-fusion search` on tiny language models: bits per byte of text files, and every mistake as one line."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from model_fusion.cli.main import app
from model_fusion.errors import InputError
from model_fusion.evaluate import running, text_loss
from model_fusion.evaluate.text_loss import MEASURES, judged
from tiny_llm import tiny_llama, word_tokenizer

WORDS = "the cat sat on a mat and the dog ran to a big red barn while birds sang of rain in may"
TEXT = (WORDS + " . ") * 6
RECIPE = """
merge_method: task_arithmetic
base_model: base
models:
  - model: a
    parameters: {weight: {range: [0, 1]}}
  - model: b
    parameters: {weight: {range: [0, 1]}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = word_tokenizer([TEXT])
    for seed, name in enumerate(("base", "a", "b")):
        model = tiny_llama(tokenizer)
        torch.manual_seed(seed)
        if seed:
            for parameter in model.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "recipe.yml").write_text(RECIPE)
    words = TEXT.split()
    (folder / "validation.txt").write_text(" ".join(words[:90]))
    (folder / "test.txt").write_text(" ".join(reversed(words)))
    return folder


def command(folder: Path, out: Path, *more: str, **paths: str) -> list[str]:
    names = {"recipe": "recipe.yml", "validation": "validation.txt", "test": "test.txt"} | paths
    files = {key: str(folder / value) for key, value in names.items()}
    return [
        "search", files["recipe"], "-o", str(out), "--validation", files["validation"], "--test", files["test"], *more
    ]  # fmt: skip


def test_the_command_searches_writes_and_says_what_it_gained(models: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, command(models, tmp_path / "out", "--trials", "4", "--window", "16"))
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/search.json").read_text())
    assert report["settings"]["metric"] == "bits_per_byte"
    assert len(report["trials"]) == 4
    assert len(report["task_arithmetic"]["grid"]) == 10
    assert report["sentence"] in done.output
    model, tokenizer = running.load(tmp_path / "out")
    text = judged([(models / "test.txt").read_text()], tokenizer, 16)
    assert text_loss.bits_per_byte(model, text) == pytest.approx(report["test"]["winner"], rel=1e-5)


def naive(model: Any, ids: list[int], window: int) -> tuple[float, int]:
    """Sum of −log2 p and number of tokens, one token at a time."""
    bits, count = 0.0, 0
    for start in range(0, len(ids), window):
        row = ids[start : start + window]
        for end in range(1, len(row)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row[:end]])).logits[0, -1].double()
            bits -= float(logits.log_softmax(-1)[row[end]]) / math.log(2)
            count += 1
    return bits, count


def check_measures(models: Path) -> None:
    model, tokenizer = running.load(models / "a")
    text = " ".join(TEXT.split()[:37])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bits, count = naive(model, ids, 8)
    rows = [ids[i : i + 8] for i in range(0, len(ids), 8)]
    size = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
    found = {name: measure(model, judged([text], tokenizer, 8)) for name, measure in MEASURES.items()}
    assert found["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)
    assert found["loss"] == pytest.approx(bits * math.log(2) / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(2 ** (bits / count), rel=1e-5)


def test_measures_equal_a_naive_reference(models: Path) -> None:
    check_measures(models)


def test_mutation_measures_that_also_count_the_first_token(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = text_loss.nats
    monkeypatch.setattr(text_loss, "nats", lambda model, text, **more: right(model, text, **more) * 1.01)
    with pytest.raises(AssertionError):
        check_measures(models)


def test_ctrl_c_keeps_the_study_and_resume_ends_it(models: Path, tmp_path: Path) -> None:
    more = ("--trials", "400", "--window", "16", "--threads", "1")
    # a background job is started with Ctrl-C ignored, and so would be its children
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from model_fusion.cli.main import main; main()"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    child = subprocess.Popen(
        [sys.executable, "-c", program, *command(models, tmp_path / "out", *more)], env=env, stderr=subprocess.PIPE
    )
    plain = tmp_path / ".out.search/plain.jsonl"
    end = time.monotonic() + 600
    while (
        child.poll() is None
        and time.monotonic() < end
        and not (plain.is_file() and len(plain.read_text().splitlines()) == 11)
    ):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=600)
    assert child.returncode == 130, error.decode()
    assert b"go on with --resume" in error
    assert not (tmp_path / "out").exists()
    tried = sum('"op_code":6' in line for line in (tmp_path / ".out.search/study.journal").read_text().splitlines())
    again = CliRunner().invoke(
        app, command(models, tmp_path / "out", "--trials", str(tried + 2), "--window", "16", "--resume")
    )
    assert again.exit_code == 0, again.output
    assert len(json.loads((tmp_path / "out/search.json").read_text())["trials"]) == tried + 2


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"recipe": "plain.yml"}, [], "no number is marked as a range"),
        ({"recipe": "empty.yml"}, [], "range [1, 1] holds nothing"),
        ({"recipe": "wild.yml"}, [], "density"),
        ({"recipe": "none.yml"}, [], "no such recipe"),
        ({"validation": "none.txt"}, [], "no such validation file"),
        ({"test": "none.txt"}, [], "no such test file"),
        ({"test": "copy.txt"}, [], "validation and test share data"),
        ({"test": "validation.txt"}, [], "validation and test share data"),
        ({"validation": "one.txt"}, [], "at least two tokens"),
        ({"test": "one.txt"}, [], "at least two tokens"),
        ({"test": "bytes.txt"}, [], "not UTF-8 text"),
        ({}, ["--metric", "perplexty"], "did you mean 'perplexity'"),
        ({}, ["--sampler", "cma"], "did you mean 'cmaes'"),
        ({}, ["--base", "nowhere"], "no such folder"),
        ({}, ["--device", "abacus"], "--device 'abacus' cannot be used here"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    models: Path, tmp_path: Path, change: dict[str, str], flags: list[str], message: str
) -> None:
    (models / "plain.yml").write_text(RECIPE.replace("{range: [0, 1]}", "0.5"))
    (models / "empty.yml").write_text(RECIPE.replace("range: [0, 1]", "range: [1, 1]"))
    wild = RECIPE.replace("task_arithmetic", "ties").replace("{weight: {range: [0, 1]}}", "{density: {range: [0, 2]}}")
    (models / "wild.yml").write_text(wild)
    (models / "copy.txt").write_text((models / "validation.txt").read_text())
    (models / "one.txt").write_text("cat")
    (models / "bytes.txt").write_bytes(b"\xff\xfe cat")
    done = CliRunner().invoke(app, command(models, tmp_path / "out", "--trials", "2", *flags, **change))
    assert isinstance(done.exception, InputError), done.output
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())
