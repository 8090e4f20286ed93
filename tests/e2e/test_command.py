"""The command itself: what a wrong call exits with, and what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("words", [["merge", "--nonsense"], ["nonsense"], ["merge", "recipe.yml"]])
def test_a_wrong_call_exits_with_2_and_no_traceback(words: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    program = "from model_fusion.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
