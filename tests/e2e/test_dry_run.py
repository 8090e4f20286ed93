"""`merge --dry-run`: the plan, the bytes, an estimate of the time; nothing is written."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from merge_fixtures import tensors, write
from model_fusion.cli.main import main
from model_fusion.errors import InputError
from model_fusion.merge import dry_run as module
from model_fusion.merge.dry_run import dry_run
from model_fusion.merge.plan import Output

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "c",
    "models": [{"model": m, "parameters": {"weight": 1, "density": 0.5}} for m in "ab"],
}


@pytest.fixture
def room(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        write(tmp_path / name, seed)
    (tmp_path / "recipe.yml").write_text(json.dumps(TIES))
    return tmp_path


def test_plan_and_bytes(room: Path) -> None:
    found = dry_run(room / "recipe.yml", room / "out")
    size = sum(t.nbytes for t in tensors(0).values())
    (merge,) = found.merges
    assert (merge.read, merge.written, merge.tensors) == (3 * size, size, len(tensors(0)))
    assert (merge.method, merge.base) == ("ties", "c")
    assert merge.seconds is not None
    assert merge.seconds > 0
    assert not (room / "out").exists()
    assert not list(room.glob(".*"))


class Clock:
    """A machine that merges `rate` seconds a byte on each of its threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rate: float, wrong: float = 1.0) -> None:
        self.now, self.merged = 0.0, 0
        clock = self

        class Run:
            def __init__(self, *_: object) -> None: ...

            def all(self, chosen: list[Output], threads: int) -> None:
                assert len(chosen) <= threads
                clock.merged += len(chosen)
                clock.now += rate * wrong * max(item.spec.nbytes for item in chosen)

        monkeypatch.setattr(module, "Run", Run)
        monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rate", [1e-6, 1e-2])
def test_the_estimate_is_the_sum_over_tensors(
    room: Path, monkeypatch: pytest.MonkeyPatch, threads: int, rate: float
) -> None:
    clock = Clock(monkeypatch, rate)
    found = dry_run(room / "recipe.yml", room / "out", threads=threads).merges[0]
    expected = rate * found.written / threads
    assert found.seconds == pytest.approx(expected, rel=0.1)
    assert found.sampled == clock.merged - 1 < found.tensors  # one to warm up
    largest = max(tensor.nbytes for tensor in tensors(0).values())
    assert clock.now <= module.BUDGET + rate * largest
    Clock(monkeypatch, rate, wrong=2.0)
    wrong = dry_run(room / "recipe.yml", room / "out", threads=threads).merges[0].seconds
    assert wrong != pytest.approx(expected, rel=0.1)


def call(monkeypatch: pytest.MonkeyPatch, room: Path, *words: str) -> None:
    monkeypatch.chdir(room)
    monkeypatch.setattr(sys, "argv", ["model-fusion", "merge", "recipe.yml", "-o", "out", "--dry-run", *words])
    main()


def test_the_command_says_it_is_an_estimate(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, room, "--threads", "2")
    said = " ".join(capsys.readouterr().out.split())
    assert "ties of 3 models, 15 tensors" in said
    assert re.search(r"about [\d.e-]+ s with 2 threads: an estimate, from \d+ tensors", said)
    assert "base c" in said
    assert said.endswith("nothing was written")


def test_intermediate_merges_are_listed_and_not_timed(room: Path) -> None:
    inner = {
        "name": "inner",
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in "ab"],
    }
    outer = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in ("inner", "c")]}
    (room / "recipe.yml").write_text(f"{json.dumps(inner)}\n---\n{json.dumps(outer)}\n")
    found = dry_run(room / "recipe.yml", room / "out")
    assert [merge.seconds is None for merge in found.merges] == [False, True]


def test_too_little_room_on_the_disk_is_told(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    assert "GB free" in dry_run(room / "recipe.yml", room / "out").warnings[0]


def test_what_the_merge_would_refuse_is_refused(
    room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="choose another folder"):
        dry_run(room / "recipe.yml", room / "a", overwrite=True)
    (room / "recipe.yml").write_text(json.dumps(TIES | {"densty": 1}))
    before = sorted(room.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, room)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert sorted(room.rglob("*")) == before


@pytest.mark.parametrize("device", ["cuda:9", "nonsense"])
def test_a_device_that_is_not_there_is_refused(room: Path, device: str) -> None:
    with pytest.raises(InputError, match="cannot be used here"):
        dry_run(room / "recipe.yml", room / "out", device=device)


def test_nan_is_forecast_where_it_is_allowed(room: Path) -> None:
    state = {name: tensor.fill_(float("nan")) for name, tensor in tensors(0).items()}
    write(room / "a", 0, state=state)
    with pytest.raises(InputError, match="NaN or Inf"):
        dry_run(room / "recipe.yml", room / "out")
    assert dry_run(room / "recipe.yml", room / "out", allow_nan=True).merges[0].seconds is not None
