"""The language measures, on the embedded LLM with a bridge that was never trained."""

import math

import numpy as np
import pytest
import torch

import fused_fixtures as fx
from model_fusion.evaluate import language
from model_fusion.evaluate.language import (
    ORDINARY_TEXT,
    UNRELATED_PROMPTS,
    beside,
    identical_without_expert,
    kl_by_prompt,
    kl_to_oracle,
    next_turns,
    oracle_prompts,
    perplexity,
)
from model_fusion.fuse.bridges import Gated, Tool
from model_fusion.fuse.experts import Expert, Field, InputSchema
from model_fusion.fuse.model import FusedModel

SCHEMA = InputSchema((Field("x", "float"),))


def probabilities(items: list[float]) -> np.ndarray:
    hit = 1 / (1 + np.exp(-np.asarray(items)))
    return np.stack([1 - hit, hit], axis=1)


@pytest.fixture(scope="module")
def fused() -> FusedModel:
    expert = Expert.from_callable(probabilities, SCHEMA, classes=("stick", "hit"))
    return FusedModel.build("smollm2", experts={"table": expert}, bridge=Gated(), dtype=torch.float32)


def test_fifty_different_prompts_that_name_no_expert() -> None:
    assert len(set(UNRELATED_PROMPTS)) == 50
    assert not any("<|" in prompt for prompt in UNRELATED_PROMPTS)


def test_the_oracle_is_told_the_experts_words(fused: FusedModel) -> None:
    assert oracle_prompts(fused, ["<|table|>, I say"], [{"table": 3.0}]) == ["hit, I say"]
    assert oracle_prompts(fused, ["<|table|> or <|table|>"], [{"table": [-1.0, 1.0]}]) == ["stick or hit"]


def test_perplexity_is_exp_of_the_models_own_loss(fused: FusedModel) -> None:
    text = ORDINARY_TEXT[:400]
    ids = fused.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        loss = float(fused.base(input_ids=ids, labels=ids).loss)
    assert perplexity(fused, fused.tokenizer, text) == pytest.approx(math.exp(loss), rel=1e-4)
    assert perplexity(fused, fused.tokenizer, text[::-1]) > 2 * perplexity(fused, fused.tokenizer, text)


def test_perplexity_beside_the_tools_words_is_the_oracles() -> None:
    fused = fx.fused("llama", "tool")
    prompt, given, text = "the table says <|sign|> now", {"sign": 0.4}, fx.TEXT
    beside_it, told = language.perplexity_beside(fused, prompt, given, text, window=7)
    assert beside_it == pytest.approx(told, rel=1e-5)
    # By hand, in one window: the mean over all tokens of what each costs after the told prompt.
    ids = fused.tokenizer(text, add_special_tokens=False)["input_ids"]
    start = fused.tokenizer("the table says yes now\n", add_special_tokens=False)["input_ids"]
    logits = fx.plain("llama")(torch.tensor([[*start, *ids]])).logits[0, len(start) - 1 : -1]
    cost = torch.nn.functional.cross_entropy(logits, torch.tensor(ids)).exp().detach()
    assert language.perplexity_beside(fused, prompt, given, text)[1] == pytest.approx(float(cost), rel=1e-4)
    # The check is red where a bridge acts.
    gated = language.perplexity_beside(fx.fused("llama", "gated"), prompt, given, text, window=7)
    assert gated[0] != pytest.approx(gated[1], rel=1e-3)


def test_the_tool_bridge_is_the_oracle_so_its_divergence_is_zero(fused: FusedModel) -> None:
    prompts, items = beside(UNRELATED_PROMPTS[:3], "table"), [{"table": x} for x in (-2.0, 0.5, 2.0)]
    fused.add_bridge("told", Tool())
    try:
        assert kl_to_oracle(fused, prompts, items, tokens=6) == pytest.approx(0.0, abs=1e-5)
    finally:
        fused.set_bridge("default")
        fused.remove_bridge("told")
    away = kl_by_prompt(fused, prompts, items, tokens=6)
    assert all(1 <= len(row) <= 6 for row in away)
    assert all(bool((row > -1e-5).all()) for row in away)
    assert float(torch.cat(away).mean()) > 1e-3  # a bridge that was never trained says nothing of the expert


def test_a_shifted_position_turns_the_zero_red(fused: FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, items = beside(UNRELATED_PROMPTS[:2], "table"), [{"table": 2.0}] * 2
    right = language.next_token_log_probs

    def shifted(fused: FusedModel, prompts: object, inputs: object, following: list[list[int]]) -> list[torch.Tensor]:
        found = right(fused, prompts, inputs, following)  # type: ignore[arg-type]
        return found if inputs is None else [torch.roll(row, 1, 0) for row in found]

    monkeypatch.setattr(language, "next_token_log_probs", shifted)
    fused.add_bridge("told", Tool())
    try:
        assert kl_to_oracle(fused, prompts, items, tokens=6) > 0.1
    finally:
        fused.set_bridge("default")
        fused.remove_bridge("told")


def test_without_the_expert_the_logits_are_the_bases(fused: FusedModel) -> None:
    assert identical_without_expert(fused, UNRELATED_PROMPTS[:4])
    fused.base.lm_head.register_forward_hook(hook := _Once())
    try:
        assert not identical_without_expert(fused, UNRELATED_PROMPTS[:4])
    finally:
        hook.on = False


class _Once:
    """Changes the logits of the first call only."""

    on, calls = True, 0

    def __call__(self, module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return output + 1e-3 if self.on and self.calls == 1 else output


def test_next_turns_show_both_speakers(fused: FusedModel) -> None:
    fused.add_bridge("told", Tool())
    try:
        (turn,) = next_turns(fused, "My table: <|table|>", UNRELATED_PROMPTS[:1], [{"table": 1.0}], tokens=8)
    finally:
        fused.set_bridge("default")
        fused.remove_bridge("told")
    assert turn["prompt"] == UNRELATED_PROMPTS[0]
    assert turn["fused"] == turn["oracle"] != ""  # the tool bridge is the oracle


def test_the_oracle_of_a_conversation(fused: FusedModel) -> None:
    talk = [{"role": "user", "content": "<|table|>?"}, {"role": "assistant", "content": "hm, <|table|>"}]
    (told,) = oracle_prompts(fused, [talk], [{"table": [-1.0, 1.0]}])
    assert [message["content"] for message in told] == ["stick?", "hm, hit"]
    assert [message["role"] for message in told] == ["user", "assistant"]
