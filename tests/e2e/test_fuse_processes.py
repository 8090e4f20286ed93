"""`torchrun --nproc-per-node 2 model-fusion fuse …` trains what one process trains on batches of twice the size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fuse_fixtures as toy
from model_fusion.fuse import saving
from model_fusion.run.fuse import fuse
from tiny_llm import tiny_llama, word_tokenizer

SOURCE = Path(__file__).parents[2] / "src"


def recipe(folder: Path, batch_size: int) -> Path:
    training = {"steps": 6, "batch_size": batch_size, "validate_every": 3, "clip": 1e9}
    return toy.write_all(folder, examples=40, base="base", bridge={"kind": "gated", "layers": [1], "width": 16},
                         training=training)  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    tokenizer = word_tokenizer([toy.PROMPT, "low", "high"])
    tiny_llama(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    command = tmp_path / "command.py"
    command.write_text("from model_fusion.cli.main import main\n\nmain()\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(command)]
    done = subprocess.run(
        [*launch, "fuse", str(recipe(tmp_path, 4)), "-o", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote") == 1

    def bridge(name: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / name / saving.WEIGHTS)

    for name, batch_size in (("one", 8), ("half", 4)):
        fuse(recipe(tmp_path, batch_size), tmp_path / name, progress=False)
    two = bridge("two")
    assert all(torch.allclose(two[key], value, atol=1e-5) for key, value in bridge("one").items())
    # The check is red where the second process adds nothing.
    assert not all(torch.allclose(two[key], value, atol=1e-5) for key, value in bridge("half").items())
