"""Statistics that do not fit: one line, exit code 2, nothing written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from merge_fixtures import statistics, write, write_statistics
from model_fusion.checkpoint.statistics import Statistics
from model_fusion.cli.main import main
from model_fusion.errors import InputError
from model_fusion.merge import engine

LAYER = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[Path, dict[str, Any]], object]


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("ab"):
        write(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(room: Path) -> dict[str, Any]:
    models = [{"model": name, "statistics": write_statistics(room, name, "gram")} for name in "ab"]
    return {"merge_method": "regmean", "models": models}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    found = dict(statistics(1, "gram"))
    change(found)
    Statistics("gram", found, 5).save(folder / "b.gram.safetensors")


def second(recipe: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = recipe["models"][1]
    return found


def nan(found: dict[str, torch.Tensor]) -> None:
    found[LAYER][2, 1] = float("nan")


CASES: dict[str, tuple[Change, str]] = {
    "no file": (lambda d, r: second(r).update(statistics="none.safetensors"), "no such statistics: 'none.safetensors'"),
    "not named": (lambda d, r: second(r).pop("statistics"), "b: regmean needs its statistics"),
    "key typo": (lambda d, r: second(r).update(statistic="x"), "did you mean 'statistics'"),
    "wrong kind": (
        lambda d, r: second(r).update(statistics=write_statistics(d, "b", "fisher")),
        "kind fisher, regmean takes gram",
    ),
    "a method without": (lambda d, r: r.update(merge_method="linear"), "linear takes no statistics"),
    "a checkpoint": (lambda d, r: second(r).update(statistics="b/model.safetensors"), "holds no statistics"),
    "wrong shape": (
        lambda d, r: rewrite(d, lambda s: s.update({LAYER: torch.eye(9)})),
        r"up_proj.weight' is \[9, 9\], its tensor needs \[8, 8\]",
    ),
    "missing tensor": (lambda d, r: rewrite(d, lambda s: s.pop(LAYER)), f"no statistic of '{LAYER}'"),
    "other model's": (lambda d, r: rewrite(d, lambda s: s.update(odd=torch.eye(2))), "'odd', which b does not have"),
    "nothing at all": (
        lambda d, r: [Statistics("gram", {}, 0).save(d / f"{n}.gram.safetensors") for n in "ab"],
        "hold",
    ),
    "NaN": (lambda d, r: rewrite(d, nan), f"NaN or Inf in .*b.gram.safetensors: {LAYER}"),
    "truncated": (
        lambda d, r: (d / "b.gram.safetensors").write_bytes((d / "b.gram.safetensors").read_bytes()[:-9]),
        "truncated",
    ),
    "unknown kind": (
        lambda d, r: save_file(
            {LAYER: torch.eye(8)},
            d / "b.gram.safetensors",
            {"model_fusion_statistics": json.dumps({"kind": "hessian", "inputs_first": []})},
        ),
        "unknown kind 'hessian'",
    ),
    "negative weight": (lambda d, r: second(r).update(parameters={"weight": -0.5}), "weights of 0 or more"),
    "alpha": (lambda d, r: r.update(parameters={"alpha": 2}), "alpha must lie in"),
}


@pytest.mark.parametrize("name", CASES)
def test_statistics_that_do_not_fit(room: Path, name: str) -> None:
    change, message = CASES[name]
    data = recipe(room)
    change(room, data)
    (room / "recipe.yml").write_text(yaml.safe_dump(data))
    before = sorted(room.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        engine.merge(room / "recipe.yml", room / "out")
    assert "\n" not in str(caught.value)
    assert sorted(room.iterdir()) == before


def test_the_unchanged_recipe_passes(room: Path) -> None:
    (room / "recipe.yml").write_text(yaml.safe_dump(recipe(room)))
    assert (engine.merge(room / "recipe.yml", room / "out") / "config.json").is_file()


COMMANDS = {
    "merge": (["merge", "recipe.yml", "-o", "out"], "no such statistics"),
    "kind": (["statistics", "a", "--kind", "gramm", "--texts", "t.txt", "-o", "x.safetensors"], "--kind 'gramm'"),
    "text": (["statistics", "a", "--texts", "none.txt", "-o", "x.safetensors"], "none.txt"),
    "name": (["statistics", "a", "--texts", "t.txt", "-o", "x.bin"], "ends in .safetensors"),
    "folder": (["statistics", "a", "--texts", "t.txt", "-o", "no/x.safetensors"], "no such folder: no"),
    "two models": (["statistics", "a", "b", "--texts", "t.txt", "-o", "x.safetensors"], "one at a time"),
    "texts": (["statistics", "a", "b", "--merged", "--texts", "t.txt", "-o", "x"], "2 models and 1 texts"),
    "model": (["statistics", "nowhere", "--texts", "t.txt", "-o", "x.safetensors"], "no such folder: 'nowhere'"),
    "state dict": (["statistics", "a/model.safetensors", "--texts", "t.txt", "-o", "x.safetensors"], "bare state dict"),
    "device": (
        ["statistics", "smollm2", "--texts", "t.txt", "-o", "x.safetensors", "--device", "nowhere"],
        "--device 'nowhere'",
    ),
    "adamerge": (["adamerge", "a", "b", "--texts", "t.txt", "-o", "no/r.yml"], "no such folder: no"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_end_with_one_line(
    room: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = COMMANDS[name]
    data = recipe(room)
    second(data)["statistics"] = "none.safetensors"
    (room / "recipe.yml").write_text(yaml.safe_dump(data))
    (room / "t.txt").write_text("a text")
    before = sorted(room.iterdir())
    monkeypatch.setattr(sys, "argv", ["model-fusion", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert sorted(room.iterdir()) == before
