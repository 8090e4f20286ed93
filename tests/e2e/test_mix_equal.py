"""What a mixture must equal, for every family: its dense model, its experts one by one, the mean of their FFNs.

Models have tied embeddings, grouped heads, llama3 rope and biases that are not zero. Each check has been seen to
fail: the mutations below break the build and expect the same check to notice.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from mix_fixtures import KINDS, model, write
from model_fusion.mix import plan as planning
from model_fusion.mix.build import build
from model_fusion.mix.families import FAMILIES
from model_fusion.mix.gates import gateless
from model_fusion.mix.routing import fixed, moe_layers, replaced
from model_fusion.recipe.mix import MixRecipe

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
BAR = 1e-5
Check = Callable[[Path, str], None]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.disable_progress_bar()


def load(folder: Path) -> Any:
    """The stock class of the folder; no key may be missing or unexpected."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    return loaded.eval()


@torch.no_grad()
def logits(loaded: Any) -> torch.Tensor:
    return loaded(IDS).logits


def mixed(folder: Path, models: list[Path], **recipe: Any) -> Any:
    experts = [{"model": str(m), "name": f"e{i}"} for i, m in enumerate(models)]
    built = build({"base_model": str(models[0]), "experts": experts, **recipe}, folder / "mixed")
    return load(built.folder)


def relatives(folder: Path, kind: str, count: int = 2) -> list[Path]:
    """Models with one trunk and FFNs of their own."""
    trunk = model(kind, 0)
    return [write(folder / f"{kind}{i}", kind, i, trunk) for i in range(count)]


def copies_are_the_dense_model(folder: Path, kind: str) -> None:
    dense = write(folder / "dense", kind)
    out = mixed(folder, [dense] * 3, gate="random", seed=1)
    assert type(out).__name__ == FAMILIES[KINDS[kind][1]].architecture
    assert (logits(out) - logits(load(dense))).abs().max() <= BAR


def one_hot_is_the_expert(folder: Path, kind: str) -> None:
    models = relatives(folder, kind)
    out = mixed(folder, models, gate="random", trunk="require_equal")
    for i, expert in enumerate(models):
        with replaced(moe_layers(out), fixed([float(i == j) for j in range(len(models))])):
            assert (logits(out) - logits(load(expert))).abs().max() <= BAR


def gateless_is_the_mean_of_ffns(folder: Path, kind: str) -> None:
    models = relatives(folder, kind, 3)
    dense = [load(m) for m in models]
    for layers in zip(*(d.model.layers for d in dense), strict=True):
        ffns = [layer.mlp.forward for layer in layers]
        layers[0].mlp.forward = lambda x, ffns=ffns: torch.stack([ffn(x) for ffn in ffns]).mean(0)
    assert (logits(mixed(folder, models, gate="gateless")) - logits(dense[0])).abs().max() <= BAR


CHECKS: list[Check] = [copies_are_the_dense_model, one_hot_is_the_expert, gateless_is_the_mean_of_ffns]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check", CHECKS)
def test_the_mixture_equals(check: Check, kind: str, tmp_path: Path) -> None:
    check(tmp_path, kind)


def _swap_gate_and_up(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """mergoo's fault in another dress: one projection's weights where another's belong."""
    family = FAMILIES[KINDS[kind][1]]
    turn = {"mlp.gate_proj.weight": "mlp.up_proj.weight", "mlp.up_proj.weight": "mlp.gate_proj.weight"}
    wrong = {target: tuple(turn.get(s, s) for s in sources) for target, sources in family.experts.items()}
    monkeypatch.setitem(FAMILIES, family.model_type, replace(family, experts=wrong))


def _every_expert_is_the_first(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    right, seen = planning._part, []

    def wrong(entry: Any, tensor: str) -> Any:
        seen.append(entry.model)
        return right(entry.model_copy(update={"model": seen[0]}), tensor)

    monkeypatch.setattr(planning, "_part", wrong)


def _gates_that_prefer(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def lopsided(inputs: Any) -> torch.Tensor:
        rows = torch.zeros(inputs.layers, inputs.experts, inputs.hidden_size)
        rows[:, 0] = 1.0
        return rows

    from model_fusion.mix.gates import GATES

    monkeypatch.setitem(GATES, "gateless", replace(gateless.GATELESS, make=lopsided))


MUTATIONS = [
    (copies_are_the_dense_model, _swap_gate_and_up),
    (one_hot_is_the_expert, _every_expert_is_the_first),
    (gateless_is_the_mean_of_ffns, _gates_that_prefer),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("check", "mutate"), MUTATIONS)
def test_the_check_notices(
    check: Check, mutate: Callable[..., None], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch, kind)
    with pytest.raises(AssertionError):
        check(tmp_path, kind)


def test_a_dropped_rope_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = planning.configs.write

    def wrong(*args: Any, **kwargs: Any) -> dict[str, Any]:
        plain = {"rope_type": "default", "rope_theta": 1e4}
        return {**right(*args, **kwargs), "rope_parameters": plain, "rope_scaling": None, "rope_theta": 1e4}

    monkeypatch.setattr(planning.configs, "write", wrong)
    with pytest.raises(AssertionError):
        copies_are_the_dense_model(tmp_path, "llama")


@pytest.mark.parametrize("kind", ["qwen2", "biased_llama"])
def test_a_shared_expert_adds_with_weight_one(kind: str, tmp_path: Path) -> None:
    models = relatives(tmp_path, kind, 3)
    shared = [{"model": str(m)} for m in models[1:]]
    out = mixed(tmp_path, [models[0]] * 2, gate="random", shared_experts=shared)
    dense = [load(m) for m in models]
    for layers in zip(*(d.model.layers for d in dense), strict=True):
        ffns = [layer.mlp.forward for layer in layers]
        layers[0].mlp.forward = lambda x, ffns=ffns: torch.stack([ffn(x) for ffn in ffns]).sum(0)
    assert (logits(out) - logits(dense[0])).abs().max() <= 5 * BAR  # the sum of three FFNs is larger as well


def test_chosen_layers_leave_the_others_dense(tmp_path: Path) -> None:
    models = relatives(tmp_path, "qwen3", 2)
    out = mixed(tmp_path, models, gate="random", layers=[1])
    assert [layer.number for layer in moe_layers(out)] == [1]
    with replaced(moe_layers(out), fixed([1.0, 0.0])):
        assert (logits(out) - logits(load(models[0]))).abs().max() <= BAR


def test_trunk_average_is_the_mean_of_the_experts(tmp_path: Path) -> None:
    models = [write(tmp_path / f"m{i}", "llama", i) for i in range(2)]
    out = mixed(tmp_path, models, gate="random", trunk="average")
    first, second = (load(m).model.norm.weight for m in models)
    assert torch.equal(out.model.norm.weight, (first + second) / 2)


def test_both_dialects_are_one_recipe() -> None:
    from model_fusion.recipe.mix import parse

    theirs = {"base_model": "b", "gate_mode": "random", "dtype": "bfloat16",
              "experts": [{"source_model": "x", "positive_prompts": ["p"]}, {"source_model": "y"}]}  # fmt: skip
    ours = MixRecipe.model_validate({"base_model": "b", "gate": "random", "dtype": "bfloat16", "experts_per_token": 2,
            "experts": [{"model": "x", "prompts": ["p"]}, {"model": "y"}]})  # fmt: skip
    assert parse(theirs) == ours
