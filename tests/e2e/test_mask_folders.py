"""Masks from checkpoints to a folder and back: `model-fusion dynamic masks | unmask`, tiny Llamas."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mix_fixtures
import model_fusion as mf
from merge_fixtures import tensors, write
from model_fusion.checkpoint.reader import open_checkpoint
from model_fusion.checkpoint.sources import resolve
from model_fusion.cli import main as command
from model_fusion.dynamic import masks as module
from model_fusion.errors import InputError, IntegrityError
from model_fusion.run.masks import FILE, unmask, write_masks

TASKS = ("code", "prose")


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["model-fusion", "dynamic", *map(str, words)])
    try:
        command.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", *TASKS)):
        mix_fixtures.write(folder / name, seed=seed)
    return folder


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / name / "model.safetensors") for name in ("base", *TASKS)]


@pytest.mark.parametrize("kind", ["emr", "tall"])
def test_there_and_back(
    models: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    strength = ["--strength", "0.5", "--strength", "0.25"] if kind == "tall" else []
    kept, out = tmp_path / "masks", tmp_path / "code"
    assert run(monkeypatch, "masks", *TASKS, "--base", "base", "--kind", kind, *strength, "-o", kept) == 0
    assert "beside the base; the experts whole: 0.19 MB" in capsys.readouterr().out
    assert run(monkeypatch, "unmask", kept, "--task", "code", "-o", out) == 0
    base, *experts = states(models)
    own = dict(zip(TASKS, experts, strict=True))
    want = (mf.emr(base, own) if kind == "emr" else mf.tall(base, own, [0.5, 0.25])).reconstruct(base, "code")
    found = load_file(out / "model.safetensors")
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("abc", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    assert mf.verify(kept).inputs == ["base", *TASKS]
    assert mf.verify(out).inputs == ["base", str(kept)]
    assert "Settings: " in (out / "README.md").read_text()


def test_a_lost_sign_or_a_changed_file_is_seen(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {task: str(models / task) for task in TASKS}
    write_masks(str(models / "base"), named, tmp_path / "good")
    good = load_file(unmask(tmp_path / "good", "prose", tmp_path / "a") / "model.safetensors")
    real = module.packed
    with monkeypatch.context() as patch:
        patch.setattr(module, "packed", lambda masks: real(~masks))
        write_masks(str(models / "base"), named, tmp_path / "bad")
    bad = load_file(unmask(tmp_path / "bad", "prose", tmp_path / "b") / "model.safetensors")
    assert not all(torch.equal(good[name], bad[name]) for name in good)
    tensors = load_file(tmp_path / "bad" / FILE)
    tensors["rescale"] += 1
    save_file(tensors, tmp_path / "bad" / FILE)
    with pytest.raises(IntegrityError, match="'rescale' changed since it was written"):
        mf.verify(tmp_path / "bad")


def test_a_head_stored_twice_and_a_base_that_moved(tmp_path: Path) -> None:
    """A tied model's file may hold its head or not; the two kinds go together. The base is found, or given."""
    for seed, name in enumerate(("base", *TASKS)):
        state = tensors(seed, torch.float32)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        if name != "code":
            del state["lm_head.weight"]
        write(tmp_path / name, seed, state=state, tie_word_embeddings=True)
    write_masks(str(tmp_path / "base"), {task: str(tmp_path / task) for task in TASKS}, tmp_path / "masks")
    found = load_file(unmask(tmp_path / "masks", "code", tmp_path / "out") / "model.safetensors")
    assert "lm_head.weight" not in found
    assert "model.embed_tokens.weight" in found
    shutil.move(tmp_path / "base", tmp_path / "moved")
    with pytest.raises(InputError, match="no such folder"):
        unmask(tmp_path / "masks", "code", tmp_path / "other")
    again = unmask(tmp_path / "masks", "code", tmp_path / "other", base=str(tmp_path / "moved"))
    assert load_file(again / "model.safetensors").keys() == found.keys()
    with pytest.raises(IntegrityError, match="another base"):
        unmask(tmp_path / "masks", "code", tmp_path / "third", base=str(tmp_path / "prose"))
    assert not (tmp_path / "third").exists()


def test_bare_state_dicts_and_another_models_tokenizer(models: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", *TASKS)):
        save_file(tensors(seed), tmp_path / f"{name}.safetensors")
    (tmp_path / "tokenizer.json").write_text("of something else")
    named = {task: str(tmp_path / f"{task}.safetensors") for task in TASKS}
    write_masks(str(tmp_path / "base.safetensors"), named, tmp_path / "masks", kind="tall")
    out = unmask(tmp_path / "masks", "code", tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "model.safetensors", "model_fusion.json"]
    assert mf.verify(out).tensors == len(tensors(0))
    worn = unmask(tmp_path / "masks", "code", tmp_path / "worn", tokenizer=str(models / "code"))
    assert (worn / "tokenizer.json").read_bytes() == (models / "code" / "tokenizer.json").read_bytes()
    assert json.loads((worn / "model_fusion.json").read_text())["recipe"]["tokenizer"] == str(models / "code")


def test_adapters_of_one_base_are_no_tied_tensors(tmp_path: Path) -> None:
    """An adapted tensor is made as it is read, perhaps where a freed one was."""
    write(tmp_path / "base", 0, state=tensors(0, torch.float32))
    for seed, task in enumerate(TASKS):
        (tmp_path / task).mkdir()
        (tmp_path / task / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
        draw = torch.Generator().manual_seed(seed)
        pairs = {
            f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{k}.weight": torch.randn(s, generator=draw)
            for i in range(4)
            for k, s in (("A", (2, 8)), ("B", (8, 2)))
        }
        save_file(pairs, tmp_path / task / "adapter_model.safetensors")
    named = {task: f"{tmp_path / 'base'}+{tmp_path / task}" for task in TASKS}
    write_masks(str(tmp_path / "base"), named, tmp_path / "masks")
    found = load_file(unmask(tmp_path / "masks", "prose", tmp_path / "out") / "model.safetensors")
    base, *experts = (
        {spec.name: checkpoint.read(spec.name).clone() for spec in checkpoint}
        for checkpoint in (open_checkpoint(resolve(name)) for name in (str(tmp_path / "base"), *named.values()))
    )
    want = mf.emr(base, dict(zip(TASKS, experts, strict=True))).reconstruct(base, "prose")
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert mf.verify(tmp_path / "masks").inputs == [str(tmp_path / "base"), *named.values()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["masks", "code", "prose", "--base", "base", "--kind", "ties", "-o", "x"], "give emr or tall"),
        (["masks", "code", "prose", "--base", "base", "--strength", "0.3", "-o", "x"], "EMR has none"),
        (["masks", "a=code", "a=prose", "--base", "base", "-o", "x"], "under a name of its own"),
        (["masks", "=code", "--base", "base", "-o", "x"], "give each expert as NAME=MODEL"),
        (["masks", "code", "none", "--base", "base", "-o", "x"], "no such folder: 'none'"),
        (["masks", "code", "--base", "base", "-o", "code"], "is, holds or lies in the input"),
        (["unmask", "base", "--task", "code", "-o", "x"], "expected the output of `model-fusion dynamic masks`"),
        (["unmask", "kept", "--task", "maths", "-o", "x"], "no task 'maths' here; there are code, prose"),
        (["unmask", "kept", "--task", "code", "--tokenizer", "none", "-o", "x"], "no such folder: 'none'"),
        (["unmask", "kept", "--task", "code", "-o", "kept"], "is, holds or lies in the input"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    models: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(models)
    if not Path("kept").exists():
        write_masks("base", {task: task for task in TASKS}, "kept")
    capsys.readouterr()
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(Path().glob("*x*"))
