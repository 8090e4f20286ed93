"""Inputs that must fail: one clear line, `InputError`, and nothing left behind."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from killing import killed
from merge_fixtures import tensors, write
from model_fusion.errors import InputError
from model_fusion.merge import engine

LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}],
}
SEARCHED = [str(Path(entry).resolve()) for entry in sys.path]  # before the tests change folder
Change = Callable[[Path, dict[str, Any]], None]


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], seed: int = 1) -> None:
    state = tensors(seed)
    change(state)
    save_file(state, folder / "model.safetensors")


def header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def index(folder: Path, shard: str) -> None:
    table = {"weight_map": {name: shard for name in tensors(1)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


class Malicious:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch pwned",)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Malicious()}))


def nan(state: dict[str, torch.Tensor]) -> None:
    state["model.norm.weight"][3] = float("nan")


def permuted(folder: Path) -> None:
    vocabulary = {f"t{i}": 15 - i for i in range(16)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))


def config(folder: Path, **values: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | values))


def first(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe["models"][0]["parameters"]


def sliced(recipe: dict[str, Any], low: int, high: int) -> None:
    recipe.clear()
    part = {"sources": [{"model": "a", "layer_range": [low, high]}]}
    recipe.update({"merge_method": "passthrough", "slices": [part]})


def duplicate(folder: Path) -> None:
    state = tensors(1)
    save_file(state, folder / "x.safetensors")
    save_file(state, folder / "y.safetensors")
    (folder / "model.safetensors").unlink()


FILTER = [{"filter": "no_such_part", "value": 1}, {"value": 1}]
CASES: dict[str, tuple[Change, str]] = {
    "top-level key": (lambda d, r: r.update(out_dtpe="bfloat16"), "did you mean 'out_dtype'"),
    "parameter typo": (lambda d, r: first(r).update(wieght=1), "did you mean 'weight'"),
    "method typo": (lambda d, r: r.update(merge_method="linaer"), "did you mean 'linear'"),
    "gradient out of range": (
        lambda d, r: (r.update(merge_method="ties", base_model="c"), first(r).update(density=[1, 2])),
        r"^ties: density must lie in \[0, 1\], got [\d.]+$",
    ),
    "parameter of another method": (lambda d, r: first(r).update(density=0.5), "belongs to .*: remove it"),
    "parameter's type": (lambda d, r: first(r).update(weight="high"), "weight must be a number, got 'high'"),
    "method in capitals": (lambda d, r: r.update(merge_method="LINEAR"), "did you mean 'linear'"),
    "model key": (lambda d, r: r["models"][0].update(modle="a"), "did you mean 'model'"),
    "filter without match": (lambda d, r: first(r).update(weight=FILTER), "'no_such_part' matches no tensor"),
    "density 50": (
        lambda d, r: (r.update(merge_method="ties", base_model="c"), first(r).update(density=50)),
        "density",
    ),
    "empty range": (lambda d, r: sliced(r, 2, 0), r"layer_range \[2, 0\]"),
    "range past the end": (lambda d, r: sliced(r, 2, 9), "a has 4 layers"),
    "no base": (lambda d, r: r.update(merge_method="ties"), "needs base_model"),
    "too many models": (
        lambda d, r: (
            r.update(merge_method="passthrough"),
            [m.clear() or m.update(model=n) for m, n in zip(r["models"], "ab", strict=True)],
        ),
        "passthrough takes",
    ),
    "no folder": (lambda d, r: r["models"][1].update(model="./nowhere"), "no such folder"),
    "no folder, one word": (lambda d, r: r["models"][1].update(model="nowhere"), "no such folder"),
    "weights cancel": (lambda d, r: first(r).update(weight=-1), "sum"),
    "missing tensor": (
        lambda d, r: rewrite(d / "b", lambda s: s.pop("lm_head.weight")),
        "b: missing tensor 'lm_head.weight'",
    ),
    "extra tensor": (
        lambda d, r: rewrite(d / "b", lambda s: s.update(odd=torch.ones(2))),
        "extra tensor 'odd'",
    ),
    "wrong shape": (
        lambda d, r: rewrite(d / "b", lambda s: s.update({"lm_head.weight": torch.ones(17, 8).bfloat16()})),
        r"\[17, 8\].*\[16, 8\]",
    ),
    "mixed dtypes": (
        lambda d, r: rewrite(d / "b", lambda s: s.update({k: v.half() for k, v in s.items()})),
        "set dtype",
    ),
    "NaN": (lambda d, r: rewrite(d / "b", nan), "model.norm.weight.*--allow-nan"),
    "permuted vocabulary": (lambda d, r: permuted(d / "b"), "vocabulary differs"),
    "other architecture": (lambda d, r: config(d / "b", model_type="gpt2"), "different architectures"),
    "quantised": (lambda d, r: config(d / "b", quantization_config={"bits": 4}), "dequantise"),
    "broken config": (lambda d, r: (d / "b/config.json").write_text("{"), r"config\.json: not valid JSON"),
    "truncated": (
        lambda d, r: os.truncate(d / "b/model.safetensors", 3000),
        r"b/model\.safetensors: tensor .* truncated",
    ),
    "empty file": (lambda d, r: os.truncate(d / "b/model.safetensors", 0), "too short"),
    "header length": (
        lambda d, r: (d / "b/model.safetensors").write_bytes(b"\xff" * 64),
        r"b/model\.safetensors: header claims",
    ),
    "header dtype": (
        lambda d, r: header(d / "b", lambda t: t["lm_head.weight"].update(dtype="Q9")),
        "'lm_head.weight': unknown dtype",
    ),
    "overlap": (
        lambda d, r: header(d / "b", lambda t: t.update(copy=t["lm_head.weight"])),
        "overlaps",
    ),
    "shape and bytes": (
        lambda d, r: header(d / "b", lambda t: t["lm_head.weight"].update(shape=[99])),
        "'lm_head.weight'.*needs",
    ),
    "path traversal": (lambda d, r: index(d / "b", "../a/model.safetensors"), "leads outside"),
    "missing shard": (lambda d, r: index(d / "b", "gone.safetensors"), "is missing"),
    "duplicate keys": (lambda d, r: duplicate(d / "b"), "is also in"),
    "malicious pickle": (lambda d, r: pickled(d / "b"), "refused"),
    "no weights": (lambda d, r: (d / "b/model.safetensors").unlink(), "no weights"),
    "adapter without config": (lambda d, r: r["models"][1].update(model="b+c"), "adapter_config"),
    "tokenizer source": (lambda d, r: r.update(tokenizer_source="unoin"), "tokenizer_source"),
}


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("abc"):
        write(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def save(room: Path, recipe: dict[str, Any]) -> Path:
    (room / "recipe.yml").write_text(json.dumps(recipe))
    return room / "recipe.yml"


@pytest.mark.parametrize("case", CASES)
def test_refused_with_one_line_and_nothing_left(room: Path, case: str) -> None:
    change, message = CASES[case]
    recipe = json.loads(json.dumps(LINEAR))
    change(room, recipe)
    before = sorted(p for p in room.iterdir())
    path = save(room, recipe)
    with pytest.raises(InputError, match=message) as caught:
        engine.merge(path, room / "out")
    assert "\n" not in str(caught.value)
    assert sorted(p for p in room.iterdir() if p != path) == before


def test_the_unchanged_recipe_passes(room: Path) -> None:
    """The mutation beside the table: with no fault, nothing is refused."""
    assert (engine.merge(save(room, LINEAR), room / "out") / "config.json").is_file()


def test_all_problems_are_listed_together(room: Path) -> None:
    rewrite(room / "b", lambda s: (s.pop("lm_head.weight"), s.update(odd=torch.ones(1))))
    permuted(room / "b")
    with pytest.raises(InputError, match="3 problems") as caught:
        engine.merge(save(room, LINEAR), room / "out")
    assert all(word in str(caught.value) for word in ("missing", "extra", "vocabulary"))


@pytest.mark.parametrize("target", ["a", "a/inside", "."])
def test_output_that_touches_an_input_is_refused(room: Path, target: str) -> None:
    before = (room / "a/model.safetensors").read_bytes()
    with pytest.raises(InputError, match="choose another folder"):
        engine.merge(save(room, LINEAR), room / target, overwrite=True)
    assert (room / "a/model.safetensors").read_bytes() == before


def test_existing_output_needs_overwrite(room: Path) -> None:
    (room / "out").mkdir()
    (room / "out/model-00001-of-00002.safetensors").write_bytes(b"old")
    with pytest.raises(InputError, match="--overwrite"):
        engine.merge(save(room, LINEAR), room / "out")
    engine.merge(save(room, LINEAR), room / "out", overwrite=True)
    assert not (room / "out/model-00001-of-00002.safetensors").exists()


def test_no_parent_folder(room: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        engine.merge(save(room, LINEAR), room / "x/y/out")


def test_disk_full_leaves_nothing(room: Path) -> None:
    """RLIMIT_FSIZE makes the write fail as a full disk does."""
    path = save(room, LINEAR)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
        with pytest.raises(InputError, match="disk full"):
            engine.merge(path, room / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(p.name for p in room.iterdir()) == ["a", "b", "c", "recipe.yml"]


WORK = """
from pathlib import Path
from model_fusion.merge import engine

engine.merge(Path("recipe.yml"), Path("out"), threads=2, shard_size=2000, resume=True)
"""


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_gives_identical_bytes(room: Path) -> None:
    path = save(room, LINEAR)
    whole = bytes_of(engine.merge(path, room / "whole", shard_size=2000))
    chooser, kills = random.Random(0), 0
    for _ in range(20):
        kills += killed(WORK, chooser.randint(1, 45), SEARCHED)
        if (room / "out").exists():
            assert bytes_of(room / "out") == whole
            shutil.rmtree(room / "out")
    assert kills >= 10
    out = engine.merge(path, room / "out", shard_size=2000, resume=True)
    assert bytes_of(out) == whole
    assert not list(room.glob(".out*"))


def test_resume_redoes_a_tensor_whose_bytes_changed(room: Path) -> None:
    path = save(room, LINEAR)
    whole = bytes_of(engine.merge(path, room / "whole"))
    assert killed(WORK, 30, SEARCHED)
    for shard in (room / ".out.partial").glob("*.partial"):
        with shard.open("r+b") as handle:
            handle.seek(-2, os.SEEK_END)
            handle.write(b"\x00\x00")
    out = engine.merge(path, room / "out", shard_size=2000, resume=True)
    again = {p.name: p.read_bytes() for p in out.glob("model_fusion.json")}
    assert again["model_fusion.json"] == whole["model_fusion.json"]


def test_resume_with_changed_inputs_starts_again(room: Path) -> None:
    path = save(room, LINEAR)
    assert killed(WORK, 30, SEARCHED)
    assert (room / ".out.partial/journal").is_file()
    write(room / "b", 9)
    whole = bytes_of(engine.merge(path, room / "whole", shard_size=2000))
    assert bytes_of(engine.merge(path, room / "out", shard_size=2000, resume=True)) == whole


def test_resume_with_another_program_or_device_starts_again(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their last bits may differ: one output is made by one of them."""
    work = engine.plan(save(room, LINEAR))
    keys = [engine._key(work, "cpu"), engine._key(work, "cpu"), engine._key(work, "cuda")]
    monkeypatch.setattr(engine.lineage, "own_version", lambda: "99")
    keys.append(engine._key(work, "cpu"))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
