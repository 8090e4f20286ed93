"""What can be asked of router training, and mergekit's two factors on an expert: each against what it says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mix_fixtures import KINDS, TEXTS, model, two_domains, write
from model_fusion.errors import InputError
from model_fusion.mix import train as training
from model_fusion.mix.build import build
from model_fusion.mix.families import FAMILIES
from model_fusion.mix.families.query_mixture import QUERY_MIXTURE
from model_fusion.mix.train import RouterSettings, balance_loss, train_router
from model_fusion.mix.verdict import evaluate

QUICK = RouterSettings(window=16, steps=12, batch_size=4, validate_every=4, learning_rate=5e-2)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return two_domains(tmp_path)


def routers(folder: Path) -> torch.Tensor:
    state = load_file(folder / "model.safetensors")
    return torch.stack([state[name] for name in sorted(state) if name.endswith("gate.weight")])


@pytest.mark.parametrize("kind", [*KINDS, "q_proj"])
def test_the_routers_alone_change_in_every_family(kind: str, tmp_path: Path) -> None:
    """Layers × experts × width numbers; every other tensor bit for bit; the verdict runs before and after."""
    dense = "llama" if kind == "q_proj" else kind
    models = [write(tmp_path / f"m{i}", dense, i, None if kind == "q_proj" else model(dense, 0)) for i in range(2)]
    experts = [{"model": str(folder), "name": name} for folder, name in zip(models, TEXTS, strict=True)]
    recipe = {"base_model": str(models[0]), "experts": experts, "gate": "random"}
    out = build({**recipe, "mix": "q_proj" if kind == "q_proj" else "ffn"}, tmp_path / "out").folder
    texts = {name: [letters * 30] * 5 for name, letters in TEXTS.items()}
    before, judged = load_file(out / "model.safetensors"), evaluate(out, texts, window=16)
    done = train_router(out, texts, QUICK, progress=False)
    after = load_file(out / "model.safetensors")
    family = QUERY_MIXTURE if kind == "q_proj" else FAMILIES[KINDS[kind][1]]
    assert done.kept
    assert done.parameters == 2 * 2 * 32
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{n}.{family.gate}" for n in (0, 1)}
    assert evaluate(out, texts, window=16).routed < judged.routed


def check_balance() -> None:
    """Switch Transformer's equation 4, counted token by token."""
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    chosen, mass = [0.0] * 4, [0.0] * 4
    for row in logits.tolist():
        total = sum(2.718281828459045**x for x in row)
        for expert in sorted(range(4), key=lambda e: -row[e])[:2]:
            chosen[expert] += 1 / (50 * 2)
        for expert in range(4):
            mass[expert] += 2.718281828459045 ** row[expert] / total / 50
    expected = 4 * sum(f * p for f, p in zip(chosen, mass, strict=True))
    assert float(training.balance_loss(logits, 2)) == pytest.approx(expected, rel=1e-5)


def test_balance_is_the_share_times_the_probability() -> None:
    check_balance()
    alike = torch.randn(4096, 4, generator=torch.Generator().manual_seed(1)) * 1e-3
    assert float(balance_loss(alike, 2)) == pytest.approx(1.0, abs=1e-3)
    assert float(balance_loss(torch.tensor([[9.0, 0.0, 0.0, 0.0]] * 8), 1)) > 3.9


def test_another_balance_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "balance_loss", lambda logits, count: balance_loss(logits, 1))
    with pytest.raises(AssertionError):
        check_balance()


def test_the_domain_is_learnt(recipe: dict[str, Any], tmp_path: Path) -> None:
    """At such a weight the added loss is nearly all of the loss."""
    out = build({**recipe, "gate": "random", "seed": 3}, tmp_path / "out").folder
    alone = train_router(out, settings=replace(QUICK, learning_rate=1e-9, steps=1), progress=False).history.losses[0]
    losses = train_router(out, settings=replace(QUICK, domain=50.0, steps=40), progress=False).history.losses
    assert losses[0] - alone > 25.0
    assert sum(losses[-4:]) / 4 - alone < 0.3 * (losses[0] - alone)


def test_rows_and_folders_of_the_same_text_train_the_same_routers(recipe: dict[str, Any], tmp_path: Path) -> None:
    """`datasets` rows are mappings with `text`."""
    texts = {n: [p.read_text() for p in sorted((tmp_path / "texts" / n).iterdir())] for n in TEXTS}
    given = {
        "recipe": None, "folder": tmp_path / "texts", "strings": texts,
        "rows": {name: [{"text": text, "id": i} for i, text in enumerate(found)] for name, found in texts.items()},
    }  # fmt: skip
    found = {}
    for name, source in given.items():
        out = build({**recipe, "gate": "random"}, tmp_path / name).folder
        train_router(out, source, QUICK, progress=False)
        found[name] = routers(out)
    assert all(torch.equal(found["recipe"], one) for one in found.values())
    out = build({**recipe, "gate": "random"}, tmp_path / "other").folder
    train_router(out, {name: found[::-1] for name, found in texts.items()}, QUICK, progress=False)
    assert not torch.equal(routers(out), found["recipe"])  # other text, other routers


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"letters": ["abc"] * 9, "digit": ["123"] * 9}, "did you mean 'digits'?"),
        ({"letters": ["abc" * 99] * 2}, "no text for expert 'digits'"),
        ({"letters": ["abc" * 99] * 2, "digits": [{"body": "1"}]}, "give strings or rows with `text`"),
    ],
)
def test_odd_texts_are_told(texts: Any, words: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    out = build({**recipe, "gate": "random"}, tmp_path / "out").folder
    with pytest.raises(InputError, match=words.replace("?", r"\?")):
        train_router(out, texts, QUICK, progress=False)


def test_no_improvement_stops_and_keeps_the_old_routers(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = build({**recipe, "gate": "random"}, tmp_path / "out").folder
    before = routers(out)
    done = train_router(out, settings=replace(QUICK, steps=400, validate_every=1, patience=2, learning_rate=1e-12))
    assert done.history.stopped == "no improvement"
    assert len(done.history.losses) < 400
    assert done.kept or torch.equal(routers(out), before)


def test_mergekits_factors(recipe: dict[str, Any], tmp_path: Path) -> None:
    """residual_scale multiplies an expert's output, noise_scale adds noise of that spread, the same every time."""
    dense = load_file(tmp_path / "letters" / "model.safetensors")
    first, second = recipe["experts"]
    first["residual_scale"], second["noise_scale"] = 0.5, 0.25
    made = [load_file(build({**recipe, "gate": "random"}, tmp_path / n).folder / "model.safetensors") for n in "xy"]
    name = "model.layers.1.block_sparse_moe.experts.{}.w{}.weight"
    down, up = dense["model.layers.1.mlp.down_proj.weight"], dense["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(made[0][name.format(0, 2)], down * 0.5)
    assert torch.equal(made[0][name.format(0, 3)], up)
    noise = made[0][name.format(1, 3)] - load_file(tmp_path / "digits" / "model.safetensors")[
        "model.layers.1.mlp.up_proj.weight"
    ]  # fmt: skip
    assert 0.2 < float(noise.std()) < 0.3
    assert torch.equal(made[0][name.format(1, 3)], made[1][name.format(1, 3)])
