"""The real tokenizer and weights: SmolLM2 merged with itself under other token numbers is SmolLM2."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import model_fusion as mf
from model_fusion.checkpoint.sources import resolve
from model_fusion.tokenizer import embeddings

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with two layers, its ordinary tokens renumbered, and one token more; `plain` is without either."""
    room, source = tmp_path_factory.mktemp("smollm2"), resolve("smollm2").folder
    slices = [{"sources": [{"model": "smollm2", "layer_range": [0, 2]}]}]
    plain = mf.merge({"merge_method": "passthrough", "slices": slices}, room / "plain")
    folder = room / "shuffled"
    shutil.copytree(plain, folder)
    data: dict[str, Any] = json.loads((source / "tokenizer.json").read_text())
    fixed = {token["id"] for token in data["added_tokens"]}
    free = [i for i in range(len(data["model"]["vocab"])) if i not in fixed]
    new_of = dict(zip(free, random.Random(0).sample(free, len(free)), strict=True)) | {i: i for i in fixed}
    data["model"]["vocab"] = {token: new_of[i] for token, i in data["model"]["vocab"].items()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"].append({"id": len(new_of), "content": "<|think|>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    state = load_file(folder / "model.safetensors")
    old_of = sorted(new_of, key=new_of.__getitem__)
    extra = torch.full((1, state[EMBEDDING].shape[1]), 0.125, dtype=torch.bfloat16)
    state[EMBEDDING] = torch.cat([state[EMBEDDING][old_of], extra])
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(state[EMBEDDING])}))
    return folder


def merged(shuffled: Path, out: Path, source: str) -> Path:
    pair = [{"model": str(m), "parameters": {"weight": 0.5}} for m in (shuffled.parent / "plain", shuffled)]
    return mf.merge({"merge_method": "linear", "models": pair, "tokenizer_source": source}, out)


def check(shuffled: Path, out: Path) -> None:
    plain, got = load_file(shuffled.parent / "plain" / "model.safetensors"), load_file(out / "model.safetensors")
    assert got.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(got[name][: len(tensor)], tensor), name


def test_base_and_union_give_the_same_model_back(shuffled: Path, tmp_path: Path) -> None:
    base, union = merged(shuffled, tmp_path / "base", "base"), merged(shuffled, tmp_path / "union", "union")
    check(shuffled, base)
    check(shuffled, union)
    tokenizer, model = AutoTokenizer.from_pretrained(union), AutoModelForCausalLM.from_pretrained(union)
    own = AutoTokenizer.from_pretrained(shuffled.parent / "plain")
    text = "Model fusion: naïve 中文 <|im_start|>user\n  3.14 it's"
    assert tokenizer(text).input_ids == own(text).input_ids
    row = tokenizer.convert_tokens_to_ids("<|think|>")
    assert row == len(own)
    assert (model.get_input_embeddings().weight[row] == 0.125).all()
    assert model.lm_head.weight.shape[0] == row + 1


def test_rows_taken_by_number_turn_it_red(shuffled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_rows", lambda output, rows, own, own_rows: torch.arange(rows) % own_rows)
    out = merged(shuffled, tmp_path / "out", "base")
    with pytest.raises(AssertionError):
        check(shuffled, out)
