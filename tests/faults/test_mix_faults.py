"""Mixes that must be refused: one clear line that names what to change, exit code 2, nothing written.

Among them every silent failure seen in other mixers: an expert with more layers was truncated, a Llama lost its
biases, a misspelt gate_mode gave `'NoneType' object is not callable`.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from killing import killed
from mix_fixtures import write
from model_fusion.cli.main import main

Change = Callable[[Path, dict[str, Any]], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama, one with four layers, a Mistral, and a LoRA adapter on attention."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("made")
    write(root / "base", "llama", 0)
    write(root / "other", "llama", 1)
    write(root / "deep", "llama", 1, num_hidden_layers=4)
    write(root / "wide", "llama", 1, intermediate_size=64)
    write(root / "biased", "llama", 1, mlp_bias=True)
    write(root / "o_biased", "llama", 1, attention_bias=True)
    write(root / "mistral", "mistral", 1)
    _adapter(root / "lora")
    return root


def _adapter(folder: Path) -> None:
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    state = {name.format("A"): torch.ones(2, 32), name.format("B"): torch.ones(32, 2)}
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _config(folder: Path, **values: Any) -> None:
    file = folder / "other" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "other" / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def _expert(recipe: dict[str, Any], model: str, *, base: bool = False) -> None:
    recipe["experts"][1]["model"] = model
    if base:
        recipe["base_model"] = recipe["experts"][0]["model"] = model


def _nan(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")


def _half(state: dict[str, torch.Tensor]) -> None:
    for name in state:
        state[name] = state[name].half()


def _untie(state: dict[str, torch.Tensor]) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1


def _tokens(folder: Path) -> None:
    file = folder / "other" / "tokenizer.json"
    data = json.loads(file.read_text())
    words = list(data["model"]["vocab"])
    data["model"]["vocab"] = {word: i for i, word in enumerate(reversed(words))}
    file.write_text(json.dumps(data))


PROMPTS = {"prompts": ["a"]}
REFUSED: dict[str, tuple[Change, str]] = {
    "deeper expert": (lambda f, r: _expert(r, "deep"), "deep: num_hidden_layers is 4, base has 2"),
    "wider expert": (lambda f, r: _expert(r, "wide"), "wide: intermediate_size is 64, base has 48"),
    "FFN biases": (lambda f, r: _expert(r, "biased"), "'model.layers.0.mlp.down_proj.bias' has no place"),
    "o_proj bias": (lambda f, r: _expert(r, "o_biased", base=True), "qwen2_moe cannot express self_attn.o_proj.bias"),
    "another kind": (lambda f, r: _expert(r, "mistral"), "mistral is mistral, base_model base is llama"),
    "other rope": (lambda f, r: _config(f, rope_parameters={"rope_type": "default", "rope_theta": 1e6}), "rope_theta"),
    "other rope scaling": (
        lambda f, r: _config(f, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}),
        "rope_scaling is",
    ),
    "unknown kind": (lambda f, r: _config(f, model_type="gemma2"), "gemma2 cannot be mixed"),
    "never heard of": (lambda f, r: _config(f, model_type="nonesuch"), "nonesuch cannot be mixed"),
    "phi": (lambda f, r: _config(f, model_type="phi"), "its FFN has biases and no gate"),
    "layers missing": (lambda f, r: _config(f, num_hidden_layers=1), "config.json says 1 layers, the weights hold 2"),
    "no sizes": (lambda f, r: _config(f, hidden_size=None), "config.json has no hidden_size"),
    "quantised": (lambda f, r: _config(f, quantization_config={"bits": 4}), "quantised"),
    "tensor missing": (
        lambda f, r: _weights(f, lambda s: s.pop("model.layers.1.mlp.up_proj.weight")),
        "other: missing tensor 'model.layers.1.mlp.up_proj.weight'",
    ),
    "tied and not": (lambda f, r: _weights(f, _untie), "tie_word_embeddings is true, yet lm_head.weight differs"),
    "two dtypes": (lambda f, r: _weights(f, _half), "set dtype in the recipe"),
    "NaN": (lambda f, r: _weights(f, _nan), "other: model.layers.1.mlp.up_proj.weight"),
    "other tokens": (lambda f, r: _tokens(f), "has another id than in base"),
    "no such folder": (lambda f, r: _expert(r, "./absent"), "no such folder: './absent'"),
    "unequal trunks": (lambda f, r: r.update(trunk="require_equal"), "set trunk to base or average"),
    "attention LoRA": (lambda f, r: _expert(r, "base+lora"), "set attention_lora to average (of all experts) or base"),
    "unknown key": (lambda f, r: r.update(experts_per_tok=2), "did you mean 'experts_per_token'?"),
    "unknown expert key": (lambda f, r: r["experts"][0].update(promts=["a"]), "did you mean 'prompts'?"),
    "misspelt gate": (lambda f, r: r.update(gate="hiden"), "unknown gate 'hiden'; did you mean 'hidden'?"),
    "misspelt gate_mode": (
        lambda f, r: (r.pop("gate"), r.update(gate_mode="hiden")),
        "unknown gate 'hiden'; did you mean 'hidden'?",
    ),
    "too many a token": (lambda f, r: r.update(experts_per_token=3), "experts_per_token 3 is more than the 2 experts"),
    "no prompts": (lambda f, r: r.update(gate="hidden"), "gate hidden needs prompts (positive_prompts)"),
    "no texts": (lambda f, r: r.update(gate="ridge"), "gate ridge needs texts or prompts for expert 'expert0'"),
    "texts absent": (
        lambda f, r: (r.update(gate="ridge"), [e.update(texts=["no/such"]) for e in r["experts"]]),
        "no such text",
    ),
    "two of one name": (lambda f, r: [e.update(name="x") for e in r["experts"]], "two experts are named 'x'"),
    "chosen layers": (lambda f, r: r.update(layers=[0], architecture="mixtral"), "mixtral cannot express a choice"),
    "layer out of range": (lambda f, r: r.update(layers=[7]), "layers: 7; base has 0 to 1"),
    "unknown architecture": (lambda f, r: r.update(architecture="mixtrl"), "did you mean 'mixtral'?"),
    "wrong architecture": (lambda f, r: r.update(architecture="flex_olmo"), "flex_olmo is made of olmo2, not of llama"),
    "shared in mixtral": (
        lambda f, r: r.update(shared_experts=[{"model": "other"}], architecture="mixtral"),
        "mixtral cannot express shared_experts",
    ),
    "deepseek": (
        lambda f, r: (r.pop("gate"), r.update(architecture="deepseek", gate_mode="random")),
        "architecture deepseek is not built",
    ),
    "experts no list": (lambda f, r: r.update(experts=3), "experts: give a list, an entry a model, not 3"),
    "prompts no list": (lambda f, r: r["experts"][0].update(prompts="abc"), "prompts: give a list, such as ['abc']"),
    "no experts": (lambda f, r: r.update(experts=[]), "experts"),
    "output is an input": (lambda f, r: r.update(out="other"), "choose another folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_line_before_any_write(
    case: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in made.iterdir():
        shutil.copytree(folder, tmp_path / folder.name)
    recipe: dict[str, Any] = {
        "base_model": "base", "experts": [{"model": "base"}, {"model": "other"}], "gate": "random",
    }  # fmt: skip
    change, words = REFUSED[case]
    change(tmp_path, recipe)
    output = recipe.pop("out", "out")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["model-fusion", "mix", "build", "recipe.yml", "-o", output])
    with pytest.raises(SystemExit) as stop:
        main()
    line = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in line
    assert line.count("\n") == 1
    assert "Traceback" not in line
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_training_needs_a_folder_that_mix_built(made: Path) -> None:
    from model_fusion.errors import InputError
    from model_fusion.mix.train import train_router

    with pytest.raises(InputError, match="give a folder that `model-fusion mix build` wrote"):
        train_router(made / "base")


@pytest.mark.parametrize("gate", ["ridge", "prefix"])
def test_a_tokenizer_of_another_model_is_told(gate: str, made: Path, tmp_path: Path) -> None:
    from model_fusion.errors import InputError
    from model_fusion.mix.build import build

    small = write(tmp_path / "small", "llama", 0, vocab_size=64)
    (tmp_path / "a.txt").write_text("abcdefgh " * 200)
    experts = [{"model": str(small), "name": n, "texts": [str(tmp_path / "a.txt")]} for n in "xy"]
    with pytest.raises(InputError, match="its embedding has 64 rows"):
        build({"base_model": str(small), "experts": experts, "gate": gate}, tmp_path / "out")


def test_training_one_expert_a_token_is_refused_where_nothing_would_move(made: Path, tmp_path: Path) -> None:
    from model_fusion.errors import InputError
    from model_fusion.mix.build import build
    from model_fusion.mix.train import RouterSettings, train_router

    (tmp_path / "a.txt").write_text("abcdefgh " * 200)
    experts = [{"model": str(made / name), "texts": [str(tmp_path / "a.txt")]} for name in ("base", "other")]
    recipe = {"base_model": str(made / "base"), "experts": experts, "gate": "random", "experts_per_token": 1}
    out = build(recipe, tmp_path / "out").folder
    quick = {"window": 16, "steps": 1, "batch_size": 2, "learning_rate": 1e-2}
    with pytest.raises(InputError, match="its weight is always 1"):
        train_router(out, settings=RouterSettings(**quick), progress=False)
    for moved in ({"routing": "soft"}, {"domain": 1.0}, {"balance": 0.1}):
        done = train_router(out, settings=RouterSettings(**quick, **moved), progress=False)
        assert done.history.losses


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("model_fusion.mix.verdict.evaluate", lambda *args, **options: pytest.fail("it was run"))
    for flag, file in (("--json", tmp_path / "no" / "v.json"), ("--html", tmp_path)):
        monkeypatch.setattr("sys.argv", ["model-fusion", "mix", "eval", str(tmp_path), flag, str(file)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert "give a file in a folder that exists" in capsys.readouterr().err


WORK = """
from pathlib import Path
from model_fusion.mix.build import build

build(Path("recipe.yml"), Path("out"), resume=True, shard_size=20_000)
"""
SEARCHED = [str(Path(entry).resolve()) for entry in sys.path]  # before the tests change folder


def test_a_build_killed_half_way_goes_on_to_identical_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_fusion.mix.build import build

    recipe = {"base_model": str(made / "base"), "gate": "random", "experts": [str(made / "base"), str(made / "other")]}
    recipe["experts"] = [{"model": folder} for folder in recipe["experts"]]
    monkeypatch.chdir(tmp_path)
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))

    def bytes_of(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}

    whole = bytes_of(build(Path("recipe.yml"), Path("whole"), shard_size=20_000).folder)
    for step in (1, 12, 40):
        assert killed(WORK, step, SEARCHED)
        assert not Path("out").exists()
    journal = Path(".out.partial/journal").read_bytes()
    assert journal.count(b"\n") > 2  # there was something to go on from
    assert bytes_of(build(Path("recipe.yml"), Path("out"), resume=True, shard_size=20_000).folder) == whole
    # red for another recipe: its bytes are other bytes, and the journal of the first is not gone on from
    Path("recipe.yml").write_text(yaml.safe_dump({**recipe, "seed": 7}))
    assert bytes_of(build(Path("recipe.yml"), Path("out"), overwrite=True, shard_size=20_000).folder) != whole
