"""Query projections as experts, in the one class that is our own: the same bars as for the stock families."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_fusion.mix.query import QueryMixtureForCausalLM
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging

from mix_fixtures import model, write
from model_fusion.errors import InputError
from model_fusion.mix import plan as planning
from model_fusion.mix.build import build
from model_fusion.mix.routing import fixed, moe_layers, replaced, souped

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def relatives(tmp_path: Path) -> list[Path]:
    """Two Llamas that differ in their query projections."""
    logging.disable_progress_bar()
    kept = {k: v for k, v in model("llama", 0).state_dict().items() if "q_proj" not in k}
    found = []
    for seed in (0, 1):
        folder = write(tmp_path / f"m{seed}", "llama", seed)
        made = LlamaForCausalLM.from_pretrained(folder)
        made.load_state_dict(kept, strict=False)
        made.save_pretrained(folder)
        found.append(folder)
    return found


def mixed(models: list[Path], out: Path, **recipe: Any) -> Any:
    experts = [{"model": str(m), "name": f"e{i}"} for i, m in enumerate(models)]
    build({"base_model": str(models[0]), "mix": "q_proj", "experts": experts, "trunk": "require_equal", **recipe}, out)
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(loaded, QueryMixtureForCausalLM)
    return loaded.eval()


@torch.no_grad()
def logits(loaded: Any) -> torch.Tensor:
    return loaded(IDS).logits


def dense(folder: Path) -> torch.Tensor:
    return logits(LlamaForCausalLM.from_pretrained(folder).eval())


def copies(models: list[Path], out: Path) -> None:
    loaded = mixed([models[0]] * 3, out, gate="random")
    assert (logits(loaded) - dense(models[0])).abs().max() <= 1e-5


def one_hot(models: list[Path], out: Path) -> None:
    loaded = mixed(models, out, gate="random")
    for i, folder in enumerate(models):
        with replaced(moe_layers(loaded), fixed([float(i == j) for j in range(2)])):
            assert (logits(loaded) - dense(folder)).abs().max() <= 1e-5


def gateless_is_the_average(models: list[Path], out: Path) -> None:
    """A single Linear: the mean of outputs is the output of the mean weights, and so gateless is the soup."""
    loaded = mixed(models, out, gate="gateless")
    first, second = (LlamaForCausalLM.from_pretrained(m).eval() for m in models)
    for one, two in zip(first.model.layers, second.model.layers, strict=True):
        one.self_attn.q_proj.weight.data.add_(two.self_attn.q_proj.weight.data).div_(2)
    assert (logits(loaded) - logits(first)).abs().max() <= 1e-5
    with souped(moe_layers(loaded)):
        assert (logits(loaded) - logits(first)).abs().max() <= 1e-5


CHECKS: list[Callable[[list[Path], Path], None]] = [copies, one_hot, gateless_is_the_average]


@pytest.mark.parametrize("check", CHECKS)
def test_the_mixture_equals(check: Callable[..., None], relatives: list[Path], tmp_path: Path) -> None:
    check(relatives, tmp_path / "out")


@pytest.mark.parametrize("check", CHECKS)
def test_the_check_notices_a_scaled_expert(
    check: Callable[..., None], relatives: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = planning._part
    monkeypatch.setattr(planning, "_part", lambda entry, tensor: planning.replace(right(entry, tensor), scale=1.1))
    with pytest.raises(AssertionError):
        check(relatives, tmp_path / "out")


def test_generation_with_and_without_a_cache_agree(relatives: list[Path], tmp_path: Path) -> None:
    loaded = mixed(relatives, tmp_path / "out", gate="random")
    made = [loaded.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=c, pad_token_id=0) for c in (True, False)]
    assert torch.equal(made[0], made[1])


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "q", "qwen3")
    with pytest.raises(InputError, match="qwen3 models cannot be mixed by q_proj; llama models can"):
        build({"base_model": str(folder), "mix": "q_proj", "experts": [{"model": str(folder)}]}, tmp_path / "out")
