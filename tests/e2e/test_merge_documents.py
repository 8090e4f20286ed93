"""Several merges in one file: the output equals merging step by step; the lineage leads to the first parents."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from merge_fixtures import tensors, write
from model_fusion.checkpoint.verify import verify
from model_fusion.errors import InputError
from model_fusion.merge import engine


def mean(*models: str, **more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in models], **more}


TWO = [mean("a", "b", name="first", dtype="float32"), mean("first", "c", dtype="float32")]


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("abc"):
        write(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(room: Path, documents: list[dict[str, Any]]) -> Path:
    path = room / "recipe.yml"
    path.write_text(yaml.safe_dump_all(documents))
    return path


def left(room: Path) -> list[str]:
    return sorted(p.name for p in room.iterdir())


def check(out: Path) -> None:
    a, b, c = (tensors(seed) for seed in range(3))
    for name, tensor in load_file(out / "model.safetensors").items():
        exact = (a[name].double() + b[name].double()) / 4 + c[name].double() / 2
        assert torch.allclose(tensor.double(), exact, atol=1e-6), name


@pytest.mark.parametrize("order", [TWO, TWO[::-1]])
def test_named_merges_are_made_first_and_removed(room: Path, order: list[dict[str, Any]]) -> None:
    out = engine.merge(save(room, order), room / "out")
    check(out)
    assert left(room) == ["a", "b", "c", "out", "recipe.yml"]
    record = json.loads((out / "model_fusion.json").read_text())
    assert [parent["model"] for parent in record["parents"]] == ["a", "b", "c"]
    found = verify(out)
    assert found.inputs == ["a", "b", "c"]
    assert not found.unread


def test_a_stage_left_out_turns_the_test_red(room: Path) -> None:
    wrong = [mean("a", "a", name="first", dtype="float32"), TWO[1]]
    with pytest.raises(AssertionError):
        check(engine.merge(save(room, wrong), room / "out"))


def test_the_card_s_one_document_form_gives_the_same_bytes(room: Path) -> None:
    one = engine.merge(save(room, TWO), room / "one")
    recipe = json.loads((one / "model_fusion.json").read_text())["recipe"]
    two = engine.merge(save(room, [recipe]), room / "two")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_three_in_a_chain_and_one_used_twice(room: Path) -> None:
    documents = [
        mean("second", "first", dtype="float32"),
        mean("first", "c", name="second", dtype="float32"),
        mean("a", "b", name="first", dtype="float32"),
    ]
    out = engine.merge(save(room, documents), room / "out")
    a, b, c = (tensors(seed)["model.norm.weight"].double() for seed in range(3))
    first = (a + b) / 2
    exact = ((first + c) / 2 + first) / 2
    assert torch.allclose(load_file(out / "model.safetensors")["model.norm.weight"].double(), exact, atol=1e-6)


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "circle": ([mean("y", "a", name="x"), mean("x", "a", name="y"), mean("x", "a")], "circle: x → y → x"),
    "itself": ([mean("x", "a", name="x"), mean("x", "a")], "circle: x → x"),
    "unused": ([mean("a", "b", name="x"), mean("a", "c")], "'x' is used by no other merge"),
    "same name": ([mean("a", "b", name="x"), mean("a", "c", name="x"), mean("x", "a")], "two merges are named 'x'"),
    "no names": ([mean("a", "b"), mean("a", "c")], "documents 1 and 2 have no name"),
    "typo inside": ([mean("a", "b", name="x", dtpe="float32"), mean("x", "c")], "merge 'x'.*did you mean 'dtype'"),
    "problem in a later stage": (
        [mean("a", "b", name="x"), mean("x", "c", parameters={"weigth": 1})],
        "did you mean 'weight'",
    ),
    "shape seen before work": (
        [
            {
                "merge_method": "passthrough",
                "name": "x",
                "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}],
            },
            mean("c", "x"),
        ],
        "x: missing tensor",
    ),
    "method typo": ([mean("a", "b", name="x") | {"merge_method": "linaer"}, mean("x", "c")], "did you mean 'linear'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_byte(room: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, message = REFUSED[case]
    path = save(room, documents)
    monkeypatch.setattr(engine, "_write", lambda *_, **__: pytest.fail("a merge was started"))
    with pytest.raises(InputError, match=message) as caught:
        engine.merge(path, room / "out")
    assert "\n" not in str(caught.value)
    assert left(room) == ["a", "b", "c", "recipe.yml"]


KILLED = """
import os, signal, sys
from pathlib import Path
from model_fusion.merge import engine, stages
steps, real = [int(sys.argv[2])], os.write
def write(*args):
    steps[0] -= 1
    if steps[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
os.write = write
engine.merge(Path(sys.argv[1]), Path("out"), resume=True, threads=1)
"""


@pytest.mark.parametrize("step", [5, 20, 27])
def test_killed_and_resumed_gives_identical_bytes(room: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(room, TWO)
    whole = engine.merge(path, room / "whole", threads=1)
    searched = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    command = [sys.executable, "-c", KILLED, str(path), str(step)]
    done = subprocess.run(command, check=False, capture_output=True, env=os.environ | {"PYTHONPATH": searched})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (room / "out").exists()
    assert (room / ".out.stages").is_dir()
    remade: list[Path] = []
    real = engine._write
    monkeypatch.setattr(
        engine, "_write", lambda work, output, *a, **k: (remade.append(output), real(work, output, *a, **k))
    )
    out = engine.merge(path, room / "out", resume=True, threads=1)
    assert len(remade) == (1 if step > 15 else 2)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    assert left(room) == ["a", "b", "c", "out", "recipe.yml", "whole"]
