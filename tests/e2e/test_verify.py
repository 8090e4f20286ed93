"""`verify` on merged folders: what is whole passes, each kind of change is named."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_fixtures import tensors, write
from model_fusion.checkpoint import verify as module
from model_fusion.checkpoint.verify import verify
from model_fusion.cli.main import main
from model_fusion.errors import InputError, ModelFusionError
from model_fusion.merge import engine

NAME = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for seed, name in enumerate("ab"):
        write(tmp_path / name, seed)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    pair = {f"base_model.model.{NAME}.lora_{k}.weight": torch.randn(s) for k, s in (("A", (2, 8)), ("B", (8, 2)))}
    save_file(pair, adapter / "adapter_model.safetensors")
    models = [{"model": m, "parameters": {"weight": 1}} for m in ("a", "b+adapter")]
    recipe = {"merge_method": "linear", "models": models, "dtype": "float16"}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    return engine.merge(tmp_path / "recipe.yml", tmp_path / "out", shard_size=2000)


def test_a_whole_output_and_its_inputs_pass(out: Path) -> None:
    result = verify(out)
    assert result.tensors == len(tensors(0))
    assert result.inputs == ["a", "b+adapter"]
    assert result.unread == []
    record = json.loads((out / "model_fusion.json").read_text())
    labels = record["tensors"][f"{NAME}.weight"]["inputs"]
    assert set(labels) == {f"a:{NAME}.weight", *(f"b+adapter:{NAME}.weight{k}" for k in ("", "+lora_A", "+lora_B"))}
    assert record["parents"][0]["sha256"] != record["parents"][1]["sha256"]


def test_inputs_that_are_gone_are_told_and_no_failure(out: Path) -> None:
    shutil.rmtree(out.parent / "a")
    assert verify(out).unread == ["a"]
    assert verify(out, inputs=False).inputs == []


def test_models_says_where_inputs_are(out: Path, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    shutil.move(out.parent / "a", tmp_path / "moved" / "a")
    assert verify(out, models=tmp_path / "moved").inputs == ["a"]


def flip(file: Path, place: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def begin(file: Path) -> int:
    return 8 + int(struct.unpack("<Q", file.read_bytes()[:8])[0])


def first_shard(out: Path) -> Path:
    return sorted(out.glob("model-*.safetensors"))[0]


def last_shard(out: Path) -> Path:
    return sorted(out.glob("model-*.safetensors"))[-1]


def retyped(out: Path) -> None:
    """The same bytes under another dtype of the same size."""
    data = last_shard(out).read_bytes()
    assert b'"F16"' in data
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length].rstrip().replace(b'"F16"', b'"I16"')
    last_shard(out).write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def added(out: Path) -> None:
    state = load_file(last_shard(out))
    save_file({**state, "odd": torch.ones(1)}, last_shard(out))
    index(out, lambda table: table.update(odd=last_shard(out).name))


def removed(out: Path) -> None:
    state = load_file(last_shard(out))
    state.pop("model.norm.weight")
    save_file(state, last_shard(out))
    index(out, lambda table: table.pop("model.norm.weight"))


def index(out: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = out / "model.safetensors.index.json"
    table = json.loads(file.read_text())
    change(table["weight_map"])
    file.write_text(json.dumps(table))


def lineage(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = out / "model_fusion.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one byte": (lambda o: flip(last_shard(o)), r"model-\d+-of-\d+.safetensors: tensor 'model.norm.weight' changed"),
    "first tensor": (
        lambda o: flip(first_shard(o), begin(first_shard(o))),
        r"model-00001-of-.*tensor 'lm_head.weight' changed",
    ),
    "another dtype": (retyped, "tensor 'model.norm.weight' is I16 .*was written as F16"),
    "added tensor": (added, "tensor 'odd' was added"),
    "removed tensor": (removed, "tensor 'model.norm.weight' was removed"),
    "missing shard": (lambda o: last_shard(o).unlink(), "shard named in .* is missing"),
    "truncated": (lambda o: last_shard(o).write_bytes(last_shard(o).read_bytes()[:-4]), "truncated"),
    "config changed": (lambda o: (o / "config.json").write_text("{}"), r"config\.json: changed"),
    "tokenizer gone": (lambda o: (o / "tokenizer.json").unlink(), r"tokenizer\.json: removed"),
    "code added": (lambda o: (o / "modeling_x.py").write_text("import os"), r"modeling_x\.py: added"),
    "pickle added": (lambda o: (o / "pytorch_model.bin").write_bytes(b"x"), r"pytorch_model\.bin: added"),
    "input changed": (lambda o: flip(o.parent / "a/model.safetensors"), "input tensor .* changed since it was read"),
    "adapter changed": (
        lambda o: flip(o.parent / "adapter/adapter_model.safetensors"),
        f"adapter: input tensor '{NAME}.weight.lora_B'",
    ),
    "input damaged": (lambda o: (o.parent / "a/model.safetensors").write_bytes(b"x"), "too short"),
    "no lineage": (lambda o: (o / "model_fusion.json").unlink(), "no model_fusion.json"),
    "lineage cut": (lambda o: (o / "model_fusion.json").write_bytes(b'{"tensors"'), "not valid JSON"),
    "lineage empty": (lambda o: lineage(o, lambda r: r.pop("tensors")), "damaged"),
    "lineage leads out": (lambda o: lineage(o, lambda r: r["files"].update({"../a/x": ""})), "outside the folder"),
    "lineage's parent": (lambda o: lineage(o, lambda r: r["parents"].pop()), "none of the parents"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_every_change_is_named_in_one_line(
    case: str, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = CHANGES[case]
    change(out)
    with pytest.raises(ModelFusionError, match=message):
        verify(out)
    monkeypatch.setattr("sys.argv", ["model-fusion", "verify", str(out)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        verify(tmp_path / "x")


def test_the_hash_is_what_finds_the_byte(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verify that trusted names, dtypes and shapes would pass."""
    flip(last_shard(out))
    recorded = json.loads((out / "model_fusion.json").read_text())["tensors"]["model.norm.weight"]["sha256"]
    real = module._hash
    monkeypatch.setattr(module, "_hash", lambda t: recorded if real(t) not in known(out) else real(t))
    assert verify(out, inputs=False).tensors == len(tensors(0))


def known(out: Path) -> list[str]:
    return [e["sha256"] for e in json.loads((out / "model_fusion.json").read_text())["tensors"].values()]


def test_the_command_line_prints_a_summary(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["model-fusion", "verify", str(out)])
    main()
    said = capsys.readouterr().out
    assert f"unchanged: {len(tensors(0))} tensors" in said
    assert "unchanged inputs: a, b+adapter" in said


def linear(*names: str, **more: object) -> dict[str, object]:
    return {"merge_method": "linear", "models": [{"model": n, "parameters": {"weight": 1}} for n in names], **more}


def test_filled_and_intermediate_tensors_are_checked_where_they_came_from(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        write(tmp_path / name, seed)
    state = tensors(1)
    state.pop("model.norm.weight")
    write(tmp_path / "b", 1, state=state)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(linear("a", "b")))
    out = engine.merge(recipe, tmp_path / "filled", fill_missing="a")
    assert verify(out).inputs == ["a", "b"]
    recipe.write_text(f"{json.dumps(linear('a', 'c', name='inner'))}\n---\n{json.dumps(linear('inner', 'c'))}\n")
    out = engine.merge(recipe, tmp_path / "chained")
    assert (verify(out).inputs, verify(out).unread) == (["a", "c"], [])
    flip(tmp_path / "a/model.safetensors")  # seen through the merge in between
    with pytest.raises(ModelFusionError, match=r"a/model.safetensors: input tensor 'model.norm.weight' changed"):
        verify(out)
