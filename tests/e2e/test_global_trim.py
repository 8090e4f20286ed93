"""`trim: global` in a recipe: the merge of folders gives what the merge of whole state dicts gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import model_fusion as mf
from merge_fixtures import tensors, write
from model_fusion.errors import InputError
from model_fusion.merge import engine
from model_fusion.merge.dry_run import dry_run


def recipe(trim: str = "global", density: Any = 0.3, **more: Any) -> dict[str, Any]:
    models = [{"model": "a", "parameters": {"density": density}}, {"model": "b", "parameters": {"density": 0.6}}]
    return {"merge_method": "ties", "base_model": "c", "models": models, "parameters": {"trim": trim}} | more


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("abc"):
        # heavily tied differences: multiples of 1/4
        write(
            tmp_path / name,
            seed,
            state={k: (4 * t.float()).round().div(4).bfloat16() for k, t in tensors(seed).items()},
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(room: Path, **more: Any) -> dict[str, Tensor]:
    (room / "r.yml").write_text(json.dumps(recipe(**more)))
    return load_file(engine.merge(room / "r.yml", room / "out", overwrite=True, threads=2) / "model.safetensors")


def wanted(trim: str = "global") -> dict[str, Tensor]:
    a, b, c = (load_file(f"{name}/model.safetensors") for name in "abc")
    return mf.merge_state_dicts("ties", [a, b], c, [{"density": 0.3}, {"density": 0.6}], trim=trim)


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_equals_the_merge_of_whole_state_dicts(room: Path) -> None:
    got = merged(room)
    assert equal(got, wanted())
    assert not equal(got, wanted("tensor"))  # the mutation: each tensor trimmed by itself


def test_a_union_s_tables_are_trimmed_with_the_rest(room: Path) -> None:
    assert equal(merged(room, tokenizer_source="union"), wanted())


def test_one_density_a_model(room: Path) -> None:
    with pytest.raises(InputError, match="all tensors of a at once: give it one density, not 2"):
        merged(room, density=[{"filter": "mlp", "value": 0.5}, {"value": 0.3}])


def test_a_dry_run_gives_no_time(room: Path) -> None:
    (room / "r.yml").write_text(json.dumps(recipe()))
    (found,) = dry_run(room / "r.yml", room / "out").merges
    assert found.seconds is None
    assert found.unknown == "trim: global looks at all tensors before it merges one"
