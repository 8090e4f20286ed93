"""The claim on the real embedded LLM: frozen, it answers in words with an expert's skill, and keeps its language."""

import numpy as np
import pytest
import torch

from model_fusion.errors import InputError
from model_fusion.fuse.bridges import Gated, Prefix
from model_fusion.fuse.experts import Expert, Field, InputSchema
from model_fusion.fuse.fit import AnswerStep, Example, encode
from model_fusion.fuse.model import FusedModel

PROMPT = "Should I hit or stick? The table: <|table|>"
SCHEMA = InputSchema((Field("x", "float"),))


def probabilities(items: list[float]) -> np.ndarray:
    hit = 1 / (1 + np.exp(-8 * np.asarray(items)))
    return np.stack([1 - hit, hit], axis=1)


@pytest.fixture(scope="module")
def expert() -> Expert:
    return Expert.from_callable(probabilities, SCHEMA, classes=("stick", "hit"))


def examples(count: int, seed: int) -> list[Example]:
    xs = np.random.default_rng(seed).uniform(-1, 1, count)
    return [Example(PROMPT, {"table": float(x)}, "hit" if x > 0 else "stick") for x in xs]


@pytest.fixture(scope="module")
def fused(expert: Expert) -> FusedModel:
    model = FusedModel.build("smollm2", experts={"table": expert}, bridge=Gated(), dtype=torch.bfloat16)
    before = {k: v.clone() for k, v in model.base.state_dict().items()}
    model.fit(examples(64, 0), validation=examples(16, 1), steps=40, batch_size=16, target=(1.0, 0.1), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.base.state_dict().items())
    return model


def agreement(model: FusedModel, flip: bool = False) -> float:
    test = examples(24, 2)
    answers = model.answer([e.prompt for e in test], [e.inputs for e in test])
    return sum((a == e.answer) != flip for a, e in zip(answers, test, strict=True)) / len(test)


def test_answers_in_words_with_the_experts_skill(fused: FusedModel) -> None:
    assert agreement(fused) >= 0.95


def test_follows_another_expert_without_retraining(fused: FusedModel) -> None:
    opposite = Expert.from_callable(lambda items: probabilities(items)[:, ::-1], SCHEMA, classes=("stick", "hit"))
    assert agreement(fused.with_experts({"table": opposite}), flip=True) >= 0.95


def test_language_survives(fused: FusedModel) -> None:
    assert "Paris" in fused.answer(["What is the capital of France?"])[0]
    inputs = fused.processor(["What is the capital of France?"])
    with torch.no_grad():
        on = fused(**inputs).logits
        with fused.bridge_off():
            off = fused.base(**inputs).logits
    assert torch.equal(on, off)


@pytest.mark.parametrize("bridge", [Prefix(), Gated()])
@torch.no_grad()
def test_shortcut_changes_no_loss(expert: Expert, bridge: Prefix | Gated) -> None:
    model = FusedModel.build("smollm2", experts={"table": expert}, bridge=bridge, dtype=torch.float32)
    rows = examples(6, 3)
    step = AnswerStep(model, encode(model, rows))
    assert step.shortcut.shared > 20
    fast = step(torch.arange(6))
    batch = model.processor.collate(step.rows, labels=True)
    assert float(abs(fast - model(**batch).loss)) < 1e-4
    # The same check is red when the stored part is wrong.
    shifted = AnswerStep(model, encode(model, rows))
    if isinstance(bridge, Gated):
        for key in {tuple(row.ids) for row in rows_of(shifted)}:
            row = next(r for r in rows_of(shifted) if tuple(r.ids) == key)
            shifted.shortcut._hidden[key] = shifted.shortcut._compute(row).roll(1, 0)
    else:
        layer = shifted.shortcut._cache.layers[0]
        layer.values = layer.values.roll(1, dims=2)
    assert float(abs(shifted(torch.arange(6)) - model(**batch).loss)) > 1e-4


def rows_of(step: AnswerStep) -> list:
    return step.rows


def test_bad_prompts_name_what_to_change(fused: FusedModel) -> None:
    with pytest.raises(InputError, match=r"did you mean <\|table\|>"):
        fused.answer(["Hit? <|tabel|>"], [{}])
    with pytest.raises(InputError, match="no input for 'table'"):
        fused.answer([PROMPT], [{}])
    with pytest.raises(InputError, match="finite number, got nan"):
        fused.answer([PROMPT], [{"table": float("nan")}])
