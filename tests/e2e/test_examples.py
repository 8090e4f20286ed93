"""The examples run, and say what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words: str) -> str:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "examples" / words[0]), *words[1:]]
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "140", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_demo_answers_with_the_experts_skill() -> None:
    said = run("blackjack_demo.py", "--bridges", "logit,gated")
    found = {row[0]: row[1:] for row in re.findall(r"│ (\w[\w ]*?) +│ ([\d.]*) *│ (-[\d.]+) +│", said)}
    assert float(found["always stick"][1]) == -0.1829
    assert float(found["gated"][0]) >= 0.95
    assert float(found["gated"][1]) == pytest.approx(float(found["the CNN alone"][1]), abs=0.01)
    assert "Paris" in said


@pytest.mark.slow
def test_trl_trains_a_bridge() -> None:
    right, of = map(int, re.findall(r"(\d+) of (\d+) new inputs", run("train_with_trl.py", "--steps", "24"))[0])
    assert right >= 0.9 * of
