"""`base+lora` reads exactly what peft's merge_and_unload makes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lora_fixtures import GPT2, LLAMA, adapter, gpt2, llama
from model_fusion.checkpoint.lora import AdaptedCheckpoint
from model_fusion.checkpoint.reader import open_checkpoint, open_model
from model_fusion.checkpoint.sources import Source, resolve
from model_fusion.errors import InputError

CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "plain": (llama, {"r": 4, "lora_alpha": 6, "target_modules": LLAMA}),
    "rank-stabilised": (llama, {"r": 4, "lora_alpha": 6, "target_modules": LLAMA, "use_rslora": True}),
    "patterns": (
        llama,
        {"r": 4, "lora_alpha": 6, "target_modules": LLAMA, "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 3}}
        | {"alpha_pattern": {"down_proj": 1, "layers.0.self_attn.q_proj": 9}},
    ),
    "patterns and rank-stabilised": (
        llama,
        {"r": 4, "lora_alpha": 6, "target_modules": LLAMA, "use_rslora": True}
        | {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    ),
    "GPT-2": (gpt2, {"r": 3, "lora_alpha": 6, "target_modules": GPT2, "fan_in_fan_out": True}),
    "embedding": (llama, {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]}),
    "whole modules": (llama, {"r": 3, "target_modules": LLAMA, "modules_to_save": ["norm", "lm_head"]}),
}


def compare(merged: PreTrainedModel, read: AdaptedCheckpoint) -> None:
    expected = merged.state_dict()
    assert set(read.names) <= set(expected)
    for name in read.names:
        assert torch.allclose(read.read(name).float(), expected[name], atol=2e-6, rtol=1e-5), name


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("case", CASES)
def test_equals_peft(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, settings = CASES[case]
    model = make()
    model.save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = adapter(model, tmp_path / "lora", **settings)
    read = open_checkpoint(resolve(f"{tmp_path}/base+{tmp_path}/lora"))
    assert isinstance(read, AdaptedCheckpoint)
    compare(merged, read)
    changed = [name for name in read.names if not torch.equal(read.read(name).float(), before[name])]
    assert len(changed) >= 3
    # the same check with alpha / r misread, or without the transposition, must be red
    for name, pair in list(read._pairs.items()):
        read._pairs[name] = type(pair)(pair.a, pair.b, pair.scale * 1.01, pair.embedding)
    with pytest.raises(AssertionError):
        compare(merged, read)


def test_an_older_adapter_s_pickle_is_read_and_nothing_but_tensors(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    merged = adapter(model, tmp_path / "lora", r=3, target_modules=LLAMA)
    file = tmp_path / "lora/adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "lora/adapter_model.bin")
    file.unlink()
    read = open_checkpoint(resolve(f"{tmp_path}/base+{tmp_path}/lora"))
    assert isinstance(read, AdaptedCheckpoint)
    compare(merged, read)
    torch.save({"lora": Path("x")}, tmp_path / "lora/adapter_model.bin")
    with pytest.raises(InputError, match=r"adapter_model\.bin: refused \(it holds more than tensors\)"):
        open_checkpoint(resolve(f"{tmp_path}/base+{tmp_path}/lora"))


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapter(model, tmp_path / "lora", r=3, target_modules=LLAMA)
    with pytest.raises(InputError, match="is a LoRA adapter, not a model: name it with its base"):
        open_model(resolve(str(tmp_path / "lora")))


def test_gpt2_without_the_outer_name(tmp_path: Path) -> None:
    """The hub's GPT-2 says h.0.…, peft says transformer.h.0.…; square matrices hide a missing transposition."""
    model = gpt2()
    model.transformer.save_pretrained(tmp_path / "base")
    merged = adapter(model, tmp_path / "lora", r=3, target_modules=["attn.c_proj"], fan_in_fan_out=True).transformer
    read = AdaptedCheckpoint(Source("x", tmp_path / "base", tmp_path / "lora"))
    assert "h.0.attn.c_proj.weight" in read
    compare(merged, read)
    read._transposed = lambda *_: False  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        compare(merged, read)


def settings(change: dict[str, Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return apply


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "DoRA": (settings({"use_dora": True}), "use_dora is not supported"),
    "PiSSA": (settings({"init_lora_weights": "pissa_niter_4"}), "changes the base"),
    "another method": (settings({"peft_type": "LOHA"}), "is not LoRA"),
    "rank 0": (settings({"r": 0}), "r at least 1"),
    "wrong rank": (settings({"r": 9}), "has rank 4, adapter_config.json says 9"),
    "broken pattern": (settings({"alpha_pattern": {"(": 1}}), "is no pattern"),
    "pattern of words": (settings({"alpha_pattern": {"x": "y"}}), "module names to numbers"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "weights are missing"),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    model = llama()
    model.save_pretrained(folder / "base")
    adapter(model, folder / "lora", r=4, target_modules=LLAMA)
    llama(hidden_size=16).save_pretrained(folder / "narrow")
    gpt2().save_pretrained(folder / "gpt2")
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_what_peft_would_compute_otherwise_is_refused(case: str, folders: Path, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    copy = tmp_path / "lora"
    copy.mkdir()
    for file in (folders / "lora").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change(copy)
    with pytest.raises(InputError, match=message):
        AdaptedCheckpoint(Source("x", folders / "base", copy))


@pytest.mark.parametrize(("base", "message"), [("narrow", "LoRA of .* is"), ("gpt2", "has no counterpart")])
def test_an_adapter_of_another_base_is_refused(base: str, message: str, folders: Path) -> None:
    with pytest.raises(InputError, match=message):
        AdaptedCheckpoint(Source("x", folders / base, folders / "lora"))
