"""A mixture as a user meets it: built from a recipe, judged, its routers trained, verified, generating."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mix_fixtures import TEXTS, two_domains, write
from model_fusion.architecture import wrapped
from model_fusion.checkpoint.verify import verify
from model_fusion.cli.main import main
from model_fusion.mix import calibrate
from model_fusion.mix import train as training
from model_fusion.mix.build import build
from model_fusion.mix.routing import moe_layers
from model_fusion.mix.train import RouterSettings, freeze, train_router
from model_fusion.mix.verdict import evaluate, sentence
from model_fusion.run.load import open_checkpoint

QUICK = RouterSettings(window=16, steps=12, batch_size=4, validate_every=4, learning_rate=5e-2)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return two_domains(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["model-fusion", *words])
    main()


def test_build_eval_train_from_the_command_line(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    run(monkeypatch, "mix", "build", "recipe.yml", "-o", "out")
    run(monkeypatch, "mix", "eval", "out", "--window", "16", "--json", "v.json", "--html", "v.html")
    run(monkeypatch, "mix", "train", "out", "--window", "16", "--steps", "4", "--batch-size", "4")
    printed = capsys.readouterr().out
    assert "Training the router" in printed
    found = json.loads(Path("v.json").read_text())
    assert found["headroom"] == pytest.approx(found["gateless"] - found["oracle"])
    assert sum(found["load"]) == pytest.approx(1.0)
    page = Path("v.html").read_text()
    assert found["sentence"] in page
    assert "http" not in page
    assert verify(Path("out")).tensors > 0


def test_texts_are_found_again_wherever_the_output_is(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe lies beside its texts, the output elsewhere, and the command runs in a third folder."""
    for name in ("recipes", "outputs", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts").rename(tmp_path / "recipes" / "texts")
    for entry in recipe["experts"]:
        entry["texts"] = [f"texts/{entry['name']}"]
    (tmp_path / "recipes" / "recipe.yml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path / "here")
    build(Path("../recipes/recipe.yml"), Path("../outputs/out"))
    monkeypatch.chdir(tmp_path)
    assert evaluate(Path("outputs/out"), window=16).experts == list(TEXTS)
    (tmp_path / "outputs").rename(tmp_path / "moved")  # to another place as far from the texts
    assert evaluate(Path("moved/out"), window=16).experts == list(TEXTS)


def test_an_expert_is_added_and_the_others_are_not_measured_again(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe |= {"gate": "ridge", "statistics": str(tmp_path / "statistics")}
    recipe["experts"][0]["name"] = "someone/letters"
    build(recipe, tmp_path / "two")
    before = {file.name: file.read_bytes() for file in (tmp_path / "statistics").iterdir()}
    measured = []
    right = calibrate.collect
    monkeypatch.setattr(calibrate, "collect", lambda *args: measured.append(1) or right(*args))
    recipe["experts"].append({**recipe["experts"][1], "name": "more"})
    recipe["experts"][2]["texts"] = [recipe["experts"][1]["texts"][0] + "/0.txt"]
    build(recipe, tmp_path / "three")
    after = {file.name: file.read_bytes() for file in (tmp_path / "statistics").iterdir()}
    assert len(measured) == 1
    assert len(after) == 3
    assert {name: after[name] for name in before} == before
    recipe["experts"].pop(0)
    build(recipe, tmp_path / "dropped")
    assert len(measured) == 1


def test_ridge_knows_letters_from_digits(recipe: dict[str, Any], tmp_path: Path) -> None:
    built = build(recipe, tmp_path / "out")
    assert built.gate == "ridge"
    assert min(built.gate_accuracy) > 0.8


def test_only_the_routers_are_trained(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = build({**recipe, "gate": "random"}, tmp_path / "out").folder
    before = load_file(out / "model.safetensors")
    done = train_router(out, settings=QUICK, progress=False)
    after = load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert done.kept
    assert done.after < done.before
    assert done.parameters == 2 * 2 * 32  # layers × experts × width
    assert changed == {f"model.layers.{n}.block_sparse_moe.gate.weight" for n in (0, 1)}
    assert verify(out).tensors == len(after)
    assert "The routers were trained" in (out / "README.md").read_text()


def test_training_more_than_the_routers_is_noticed(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(loaded: Any) -> tuple[Any, Any]:  # "gate" in the name, as another mixer does it
        loaded.requires_grad_(False)
        parameters = [p for name, p in loaded.named_parameters() if "gate" in name]
        for parameter in parameters:
            parameter.requires_grad_(True)
        return moe_layers(loaded), parameters

    monkeypatch.setattr(training, "freeze", wrong)
    out = build({**recipe, "gate": "random"}, tmp_path / "out").folder
    assert train_router(out, settings=QUICK, progress=False).parameters != 2 * 2 * 32


def test_the_trainable_parameters_are_the_routers(recipe: dict[str, Any], tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(build(recipe, tmp_path / "out").folder)
    freeze(loaded)
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == 2 * 2 * 32


def test_an_interrupted_training_goes_on_to_the_same_routers(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str, stop_at: int | None) -> torch.Tensor:
        out = build({**recipe, "gate": "random"}, tmp_path / name / "out").folder
        if stop_at is not None:
            calls = []
            right = training._Objective.forward

            def forward(self: Any, indices: torch.Tensor) -> torch.Tensor:
                calls.append(1)
                if len(calls) > stop_at:
                    raise KeyboardInterrupt
                return right(self, indices)

            monkeypatch.setattr(training._Objective, "forward", forward)
            monkeypatch.setattr("model_fusion.training.loop.TrainSettings.save_every_seconds", -1.0, raising=False)
            monkeypatch.setattr(RouterSettings, "loop", _saving(RouterSettings.loop))
            with pytest.raises(KeyboardInterrupt):
                train_router(out, settings=QUICK, progress=False)
            monkeypatch.undo()
        train_router(out, settings=QUICK, progress=False)
        return load_file(out / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]

    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    assert torch.equal(trained("whole", None), trained("resumed", 7))


def _saving(right: Any) -> Any:
    from dataclasses import replace

    return lambda self: replace(right(self), save_every_seconds=-1.0)


def test_the_verdict_is_the_models_own_losses(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The matrix is what the dense experts lose themselves: with one trunk, forcing an expert is that expert."""
    out = build(recipe, tmp_path / "out").folder
    found = evaluate(out, window=16)
    tokenizer = AutoTokenizer.from_pretrained(out)
    for e, name in enumerate(TEXTS):
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for d, domain in enumerate(TEXTS):
            text = (tmp_path / "texts" / domain / "4.txt").read_text()
            ids = torch.tensor(tokenizer(text)["input_ids"])[: 300 // 16 * 16].view(-1, 16)
            with torch.no_grad():
                bits = float(dense(ids, labels=ids).loss) / 0.6931471805599453
            assert found.matrix[e][d] == pytest.approx(bits, abs=1e-4)


def test_copies_have_no_headroom_and_the_verdict_says_so(recipe: dict[str, Any], tmp_path: Path) -> None:
    for entry in recipe["experts"]:
        entry["model"] = recipe["base_model"]
    found = evaluate(build(recipe, tmp_path / "out").folder, window=16)
    assert found.headroom == pytest.approx(0.0, abs=1e-5)
    assert found.sentence.startswith("Training the router will not pay, because")


def test_the_sentence_says_what_is_left_to_win() -> None:
    bits = {"oracle": 2.0, "soup": 2.6, "gateless": 2.5, "routed": 2.4}
    assert sentence(0.5, bits, [0.9], True).startswith("Training the router can pay, because")
    assert "gate prefix" not in sentence(0.5, bits, [0.9], True) + sentence(0.5, bits, [0.4], False)
    assert "for 0.400 of the tokens: gate prefix" in sentence(0.5, bits, [0.3, 0.5], True)
    assert "will not pay, because the routers as they are come" in sentence(0.5, {**bits, "routed": 2.01}, [0.4], True)
    assert "only 0.010 bits" in sentence(0.01, {**bits, "gateless": 2.01}, [0.4], True)


def test_generates(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = build(recipe, tmp_path / "out").folder
    loaded = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("abc", return_tensors="pt")
    assert loaded.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] == 7


@torch.no_grad()
def check_asked_as_it_is(out: Path) -> None:
    """The command line's model is the stock one: same kernels, same logits, same words."""
    asked, stock = open_checkpoint(out), AutoModelForCausalLM.from_pretrained(out)
    assert asked.base.config._experts_implementation == stock.config._experts_implementation
    inputs = AutoTokenizer.from_pretrained(out)("abc", return_tensors="pt")
    assert torch.equal(asked(**inputs).logits, stock.to(asked.dtype)(**inputs).logits)


def test_generate_and_chat_open_a_mixture(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = build(recipe, tmp_path / "out").folder
    check_asked_as_it_is(out)
    run(monkeypatch, "generate", str(out), "--prompt", "abc", "--max-new-tokens", "4")
    answer = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n/reset\nabc\n"))
    run(monkeypatch, "chat", str(out), "--max-new-tokens", "4")
    said = capsys.readouterr()
    assert said.out == f"{answer}the conversation starts afresh\n{answer}", said.err
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "generate", str(out), "--prompt", "<|table|>", "--input", "table=1")
    assert stop.value.code == 2
    assert "table" in capsys.readouterr().err


def test_a_kernel_that_is_lost_is_seen(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapped, "KERNELS", ("_attn_implementation",))
    with pytest.raises(AssertionError):
        check_asked_as_it_is(build(recipe, tmp_path / "out").folder)


def _adapter(folder: Path, module: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    out, inner = {"up_proj": (48, 32), "q_proj": (32, 32)}[module]
    a, b = torch.randn(2, inner, generator=generator), torch.randn(out, 2, generator=generator)
    place = "mlp" if module == "up_proj" else "self_attn"
    name = f"base_model.model.model.layers.0.{place}.{module}.lora_{{}}.weight"
    save_file({name.format("A"): a, name.format("B"): b}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return a, b


def test_ffn_adapters_are_folded_in_exactly(tmp_path: Path) -> None:
    base = write(tmp_path / "base", "llama", 0)
    weight = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    factors = [_adapter(tmp_path / f"lora{i}", "up_proj", i) for i in range(2)]
    experts = [{"model": f"{base}+{tmp_path / f'lora{i}'}"} for i in range(2)]
    out = build({"base_model": str(base), "experts": experts, "gate": "random"}, tmp_path / "out").folder
    found = load_file(out / "model.safetensors")
    for i, (a, b) in enumerate(factors):
        made = found[f"model.layers.0.block_sparse_moe.experts.{i}.w3.weight"]
        assert (made - (weight + 2.0 * b @ a)).abs().max() <= 1e-5
        assert torch.equal(
            found[f"model.layers.1.block_sparse_moe.experts.{i}.w3.weight"],
            found["model.layers.1.block_sparse_moe.experts.0.w3.weight"],
        )


@pytest.mark.parametrize("choice", ["average", "base"])
def test_attention_adapters_are_averaged_or_left_out(choice: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base", "llama", 0)
    weight = load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    factors = [_adapter(tmp_path / f"lora{i}", "q_proj", i) for i in range(2)]
    experts = [{"model": f"{base}+{tmp_path / f'lora{i}'}"} for i in range(2)]
    recipe = {"base_model": str(base), "experts": experts, "gate": "random", "attention_lora": choice}
    found = load_file(build(recipe, tmp_path / "out").folder / "model.safetensors")
    mean = sum(2.0 * b @ a for a, b in factors) / 2
    expected = weight + mean if choice == "average" else weight
    assert (found["model.layers.0.self_attn.q_proj.weight"] - expected).abs().max() <= 1e-5


def test_two_builds_are_the_same_bytes(recipe: dict[str, Any], tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        out = build(recipe, tmp_path / name).folder
        digests.add(hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1
