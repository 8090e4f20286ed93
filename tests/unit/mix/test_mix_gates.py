"""Gates against the formulas they come from, worked out anew on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mix_fixtures import write
from model_fusion.mix.build import plan
from model_fusion.mix.calibrate import calibrate

PROMPTS = [["abc", "hello there"], ["12", "3456 7"]]
NEGATIVE = [["zz"], []]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gates") / "base", "llama", 0)


def gates(base: Path, gate: str, **recipe: Any) -> torch.Tensor:
    experts = [
        {"model": str(base), "prompts": p, "negative_prompts": n} for p, n in zip(PROMPTS, NEGATIVE, strict=True)
    ]
    return calibrate(plan({"base_model": str(base), "experts": experts, "gate": gate, **recipe}), None).gates


def side(base: Path, texts: list[str], average: bool) -> torch.Tensor:
    """mergekit/moe/router.py's get_hidden_states: [L, H], mean over prompts."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    rows = []
    for text in texts:
        with torch.no_grad():
            out = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        states = torch.stack(out.hidden_states[:-1])[:, 0]
        rows.append(states.mean(1) if average else states[:, -1])
    return torch.stack(rows).mean(0)


@pytest.mark.parametrize(("gate", "average"), [("hidden", False), ("hidden_avg", True)])
def test_hidden_gates_are_mergekits(base: Path, gate: str, average: bool) -> None:
    first = side(base, PROMPTS[0], average) - side(base, NEGATIVE[0], average)
    expected = torch.stack([first, side(base, PROMPTS[1], average)], dim=1)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    assert (gates(base, gate) - expected).abs().max() <= 1e-5


def test_the_two_hidden_gates_differ(base: Path) -> None:
    assert (gates(base, "hidden") - gates(base, "hidden_avg")).abs().max() > 1e-2


def test_cheap_embed_sums_token_embeddings(base: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    table = model.model.embed_tokens.weight.detach()
    sums = [table[tokenizer(text)["input_ids"]].sum(0) for text in PROMPTS[1]]
    expected = torch.stack(sums).mean(0)
    made = gates(base, "cheap_embed")
    assert (made[0, 1] - expected / expected.norm()).abs().max() <= 1e-5
    assert torch.equal(made[0], made[1])


def test_random_gates_have_their_spread_and_their_seed(base: Path) -> None:
    first, second = gates(base, "random", seed=1), gates(base, "random", seed=2)
    assert abs(float(first.std()) - 1) < 0.2
    assert not torch.equal(first, second)
    assert torch.equal(first, gates(base, "random", seed=1))
    assert float(gates(base, "uniform_random").abs().max()) <= 32**-0.5


@pytest.mark.parametrize("gate", ["mean", "ridge"])
def test_prompts_alone_calibrate(base: Path, gate: str) -> None:
    assert bool(torch.isfinite(gates(base, gate)).all())
