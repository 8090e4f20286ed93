"""Saving a twin over another one: killed anywhere, or on a full disk, what loads is whole."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch

import mix_fixtures
from killing import killed
from model_fusion.dynamic.causal_lm import TwinForCausalLM
from model_fusion.dynamic.parts import exclusive
from model_fusion.errors import InputError

WORK = """
import torch
from pathlib import Path
from model_fusion.dynamic.causal_lm import TwinForCausalLM

twin = TwinForCausalLM.from_pretrained("out")
twin.twin._factors["model/norm/weight:down"].zero_()
twin.save_pretrained("out")
"""
SEARCHED = [str(Path(entry).resolve()) for entry in sys.path]  # before the tests change folder
IDS = torch.arange(60, 70)[None]
ONE = torch.tensor([[0.25, 0.75]])


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TwinForCausalLM:
    monkeypatch.chdir(tmp_path)
    shared, *experts = (mix_fixtures.model("llama", seed) for seed in range(3))
    parts = exclusive(shared.state_dict(), [e.state_dict() for e in experts], 0.2)
    made = TwinForCausalLM(shared, parts, None, ["one", "two"])
    made.save_pretrained("out")
    return made


def logits() -> torch.Tensor:
    found: torch.Tensor = TwinForCausalLM.from_pretrained("out")(IDS, expert_weights=ONE).logits
    return found


def steps(made: TwinForCausalLM, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many writing system calls one saving makes, as `killed` counts them."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("pwrite", "write", "rename", "fsync"):
            real = getattr(os, name)
            patch.setattr(os, name, lambda *a, real=real, name=name: (seen.append(name), real(*a))[1])
        made.save_pretrained("out")
    return len(seen)


def test_killed_while_it_is_replaced(saved: TwinForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    count, before = steps(saved, monkeypatch), logits()
    for step in (2, count - 1):  # while the new files are synced; between the two renames or after
        assert killed(WORK, step, SEARCHED)
        if not Path("out").exists():
            assert Path(".out.old").is_dir()  # comes back with the next save
        else:
            assert torch.equal(logits(), before)
    saved.save_pretrained("out")
    assert torch.equal(logits(), before)
    assert not killed(WORK, count + 5, SEARCHED)
    assert not torch.equal(logits(), before)
    assert os.listdir() == ["out"]


def test_a_full_disk_is_one_line(saved: TwinForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = logits()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="disk full while writing"):
            saved.save_pretrained("out")
    assert torch.equal(logits(), before)
    assert os.listdir() == ["out"]
