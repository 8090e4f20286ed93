"""Data-based merges from recipe to folder: on made-up statistics, and from text through the commands."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import model_fusion as mf
from merge_fixtures import statistics, tensors, write, write_statistics
from model_fusion.checkpoint.statistics import Kind, Statistics
from model_fusion.checkpoint.verify import verify
from model_fusion.cli.main import main
from model_fusion.errors import IntegrityError
from model_fusion.merge import engine
from model_fusion.merge.methods import data_based
from tiny_llm import tiny_llama, word_tokenizer


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate("abc"):
        write(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(room: Path, kind: Kind, **more: Any) -> Path:
    models = [
        {"model": name, "statistics": write_statistics(room, name, kind), "parameters": {"weight": weight}}
        for name, weight in (("a", 1.0), ("b", 0.5))
    ]
    method = "fisher" if kind == "fisher" else "regmean"
    data = {"merge_method": method, "models": models, "dtype": "float32", **more}
    (room / "recipe.yml").write_text(yaml.safe_dump(data))
    return room / "recipe.yml"


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["model-fusion", *map(str, words)])
    main()


def wanted(kind: Kind, name: str) -> np.ndarray:
    a, b = (tensors(seed)[name].double().numpy() for seed in range(2))
    data = [statistics(seed, kind).get(name) for seed in range(2)]
    if data[0] is None or data[1] is None:
        return (a + 0.5 * b) / 1.5
    one, two = data[0].double().numpy(), 0.5 * data[1].double().numpy()
    if kind == "fisher":
        return (one * a + two * b) / (one + two)
    one, two = (0.9 * g + 0.1 * np.diag(np.diag(g)) for g in (one, two))
    return (a @ one + b @ two) @ np.linalg.inv(one + two)


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_a_recipe_with_statistics(
    room: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "merge", str(recipe(room, kind)), "-o", "out", "--dry-run")
    assert not (room / "out").exists()
    capsys.readouterr()
    command(monkeypatch, "merge", str(recipe(room, kind)), "-o", "out")
    assert "8 of 15 tensors have statistics; the other 7 are weighted means" in capsys.readouterr().out
    for name, tensor in load_file(room / "out/model.safetensors").items():
        assert np.allclose(tensor.double().numpy(), wanted(kind, name), rtol=1e-3, atol=2e-4), name
    command(monkeypatch, "verify", "out")
    lineage = json.loads((room / "out/model_fusion.json").read_text())
    assert [parent.get("statistics") for parent in lineage["parents"]] == [None, None, kind, kind]
    layer = "model.layers.0.mlp.up_proj.weight"
    assert f"a.{kind}.safetensors:{layer}" in lineage["tensors"][layer]["inputs"]
    card = (room / "out/README.md").read_text()
    assert "Made from `a` and `b` by" in card
    assert "weighted means" in card


def test_the_recipe_check_goes_red(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_based, "shrunk", lambda gram, alpha: gram.double())
    out = load_file(engine.merge(recipe(room, "gram"), room / "out") / "model.safetensors")
    assert any(not np.allclose(t.numpy(), wanted("gram", n), rtol=1e-3, atol=2e-4) for n, t in out.items())


def test_statistics_that_changed_are_noticed(room: Path) -> None:
    out = engine.merge(recipe(room, "gram"), room / "out")
    assert verify(out, models=room).inputs == ["a", "b", "a.gram.safetensors", "b.gram.safetensors"]
    changed = statistics(0, "gram")
    Statistics("gram", {n: 2 * t for n, t in changed.items()}, 5).save(room / "a.gram.safetensors")
    with pytest.raises(IntegrityError, match=r"a\.gram\.safetensors.*changed since it was read"):
        verify(out, models=room)


def test_resuming_with_other_statistics_starts_again(room: Path) -> None:
    work = engine.plan(recipe(room, "gram"))
    before = engine._key(work, "cpu")
    Statistics("gram", {n: 2 * t for n, t in statistics(0, "gram").items()}, 5).save(room / "a.gram.safetensors")
    assert engine._key(engine.plan(room / "recipe.yml"), "cpu") != before


def test_slices_take_the_statistics_of_their_layer(room: Path) -> None:
    source = {"layer_range": [1, 3]}
    models = [{**source, "model": n, "statistics": write_statistics(room, n, "gram")} for n in "ab"]
    data = {"merge_method": "regmean", "slices": [{"sources": models}], "dtype": "float32"}
    (room / "recipe.yml").write_text(yaml.safe_dump({**data, "parameters": {"alpha": 0.5}}))
    got = load_file(engine.merge(room / "recipe.yml", room / "out") / "model.safetensors")
    states, grams = [tensors(seed) for seed in range(2)], [statistics(seed, "gram") for seed in range(2)]
    want = mf.merge_state_dicts("regmean", states, statistics=grams, alpha=0.5)
    assert torch.allclose(
        got["model.layers.0.mlp.up_proj.weight"], want["model.layers.1.mlp.up_proj.weight"].float(), atol=1e-2
    )


def test_a_merge_of_merges_takes_statistics_and_verifies(room: Path) -> None:
    first = {"name": "mixed", **yaml.safe_load(recipe(room, "gram").read_text())}
    last = {"merge_method": "linear", "models": [{"model": "mixed"}, {"model": "c"}], "dtype": "float32"}
    (room / "recipe.yml").write_text(yaml.safe_dump_all([first, last]))
    out = engine.merge(room / "recipe.yml", room / "out")
    assert "a.gram.safetensors" in verify(out, models=room).inputs


def test_rows_that_move_with_their_tokens_have_no_statistics(room: Path) -> None:
    """A Fisher has the order of the model's own tokens: where they are renumbered, the table is a mean."""
    vocabulary = {f"t{i}": 15 - i for i in range(16)}
    (room / "b/tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    path, name = recipe(room, "fisher", tokenizer_source="a"), "model.embed_tokens.weight"
    for seed, model in enumerate("ab"):
        whole = {**statistics(seed, "fisher"), name: torch.rand(16, 8) * 100**seed}
        Statistics("fisher", whole, 5).save(room / f"{model}.fisher.safetensors")
    got = load_file(engine.merge(path, room / "out") / "model.safetensors")
    a, b = (tensors(seed)[name].float() for seed in range(2))
    assert torch.allclose(got[name], (a + 0.5 * b.flip(0)) / 1.5, atol=1e-6)
    layer = "model.layers.0.mlp.up_proj.weight"
    assert np.allclose(got[layer].numpy(), wanted("fisher", layer), rtol=1e-3, atol=2e-4)


def test_modules_take_statistics(room: Path) -> None:
    whole = yaml.safe_load(recipe(room, "gram").read_text())
    models = whole.pop("models")
    (room / "recipe.yml").write_text(
        yaml.safe_dump({**whole, "base_model": "a", "modules": {"text_decoder": {"models": models}}})
    )
    out = load_file(engine.merge(room / "recipe.yml", room / "out") / "model.safetensors")
    assert all(np.allclose(t.numpy(), wanted("gram", n), rtol=1e-3, atol=2e-4) for n, t in out.items())


def save_gpt2(folder: Path, seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=1))
    model.save_pretrained(folder)
    return model


def test_conv1d_from_files_is_as_from_modules(tmp_path: Path) -> None:
    """A square Conv1D's orientation is known only from what was recorded with its Gram matrix."""
    models = [save_gpt2(tmp_path / str(seed), seed) for seed in range(2)]
    ids = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(0))
    found = [mf.collect_statistics(model, [ids]) for model in models]
    entries = [
        {"model": str(i), "statistics": own.save(tmp_path / f"{i}.safetensors").name} for i, own in enumerate(found)
    ]
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump({"merge_method": "regmean", "models": entries}))
    got = load_file(engine.merge(tmp_path / "recipe.yml", tmp_path / "out") / "model.safetensors")
    want = mf.merge_state_dicts("regmean", [m.state_dict() for m in models], statistics=found)
    assert all(torch.allclose(tensor, want[name], atol=1e-6) for name, tensor in got.items())
    name = "transformer.h.0.attn.c_proj.weight"
    hidden = [model.transformer.h[0].attn.c_proj for model in models]
    inputs: list[Tensor] = []
    for model, part in zip(models, hidden, strict=True):
        with torch.no_grad():
            handle = part.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].view(-1, 24)))
            model(ids)
            handle.remove()
    # the merged map fits what each model's own map did to its own inputs better than the mean of the maps
    mean = sum(part.weight for part in hidden) / 2

    def loss(weight: Tensor) -> float:
        return sum(
            float((x @ (weight - p.weight)).detach().square().sum()) for x, p in zip(inputs, hidden, strict=True)
        )

    assert loss(got[name]) < 0.9 * loss(mean)


WORDS = {"one": "the cat sat on the mat and the dog ate the hat", "two": "a sun was warm in summer and a moon was cold"}


@pytest.fixture
def language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama, two fine-tunes and their texts."""
    tokenizer = word_tokenizer(WORDS.values())
    for seed, name in enumerate(["base", *WORDS]):
        model = tiny_llama(tokenizer)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02 * (seed > 0))
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, text in WORDS.items():
        (tmp_path / f"{name}.txt").write_text(f"{text} " * 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("way", ["gram", "fisher", "merged"])
def test_from_text_to_a_verified_merge(language: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: f"{name}.safetensors" for name in WORDS}
    if way == "merged":
        words = ["one", "two", "--merged", "--texts", "one.txt", "--texts", "two.txt", "--window", "8", "-o", "grams"]
        command(monkeypatch, "statistics", *words)
        files = {"one": "grams/0-one.gram.safetensors", "two": "grams/1-two.gram.safetensors"}
    else:
        for name in WORDS:
            words = [name, "--kind", way, "--texts", f"{name}.txt", "--window", "8", "-o", files[name]]
            command(monkeypatch, "statistics", *words)
    found = Statistics.load(files["one"])
    assert found.about["model"] == "one"
    assert ("model.embed_tokens.weight" in found) == (way == "fisher")
    method = "fisher" if way == "fisher" else "regmean"
    entries = [{"model": name, "statistics": file} for name, file in files.items()]
    Path("recipe.yml").write_text(yaml.safe_dump({"merge_method": method, "models": entries}))
    command(monkeypatch, "merge", "recipe.yml", "-o", "out")
    command(monkeypatch, "verify", "out")


def test_adamerge_writes_a_recipe_that_merges(language: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--texts", "one.txt", "--texts", "two.txt", "--window", "8", "--steps", "5", "--learning-rate", "0.05"]
    command(monkeypatch, "adamerge", "base", "one", "two", *words, "-o", "recipe.yml")
    command(monkeypatch, "merge", "recipe.yml", "-o", "out")
    command(monkeypatch, "verify", "out")
    base, one, two, out = (load_file(Path(name, "model.safetensors")) for name in ("base", "one", "two", "out"))
    given = yaml.safe_load(Path("recipe.yml").read_text())["models"]
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        shares = [
            next(e["value"] for e in entry["parameters"]["weight"] if e.get("filter", name) == name) for entry in given
        ]
        assert shares != [0.3, 0.3]
        want = base[name] + sum(s * (t[name] - base[name]) for s, t in zip(shares, (one, two), strict=True))
        assert torch.allclose(out[name], want, atol=1e-6)


def test_statistics_of_an_adapter_are_those_of_the_whole(language: Path) -> None:
    from model_fusion.merge.calibration.language import Texts, of_model

    adapter, name = language / "adapter", "model.layers.1.mlp.up_proj"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(2, 48, generator=generator), torch.randn(96, 2, generator=generator)
    prefix = f"base_model.model.{name}"
    save_file({f"{prefix}.lora_A.weight": low, f"{prefix}.lora_B.weight": high}, adapter / "adapter_model.safetensors")
    engine.merge(engine.MergeRecipe(merge_method="passthrough", models=[{"model": "base+adapter"}]), language / "whole")
    texts = Texts(["one.txt"], window=8)
    one, two, base = (of_model(model, texts, "gram") for model in ("base+adapter", "whole", "base"))
    later = "model.layers.2.mlp.down_proj.weight"
    assert torch.allclose(one[later], two[later], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one[later], base[later], rtol=1e-2)
