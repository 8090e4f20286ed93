"""`generate` needs nothing special: beams, sampling, the KV cache and penalties treat a fused model as any LLM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

import fused_fixtures as fx
from model_fusion.errors import InputError
from model_fusion.fuse import answer as answering
from model_fusion.fuse.model import FusedModel

every_architecture = pytest.mark.parametrize("architecture", fx.ARCHITECTURES)
every_bridge = pytest.mark.parametrize("bridge", list(fx.TRAINED))
LENGTH = 6
FIXED: dict[str, Any] = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}
STEPS: dict[str, Any] = {**FIXED, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}


def batch_of(fused: FusedModel, rows: tuple[int, ...] = (0, 1, 2)) -> dict[str, Tensor]:
    return fused.processor([fx.PROMPTS[row] for row in rows], [fx.INPUTS[row] for row in rows])


def new_ids(fused: FusedModel, rows: tuple[int, ...] = (0, 1, 2), **options: Any) -> list[list[int]]:
    batch = batch_of(fused, rows)
    ids: list[list[int]] = fused.generate(**batch, **{**FIXED, **options})[:, batch["input_ids"].shape[1] :].tolist()
    return ids


@every_architecture
@every_bridge
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_answers_as_its_rows_alone(architecture: str, bridge: str, beams: int) -> None:
    fused = fx.fused(architecture, bridge)
    together = new_ids(fused, num_beams=beams)
    assert together == [new_ids(fused, (row,), num_beams=beams)[0] for row in range(3)]


@pytest.mark.parametrize("beams", [1, 3])
@every_architecture
def test_soft_tokens_generate_as_given_embeddings(architecture: str, beams: int) -> None:
    """The plain base, handed the same embeddings, writes the same ids: beams keep each row's own features."""
    fused = fx.fused(architecture, "prefix")
    batch, found = batch_of(fused), []
    handle = fused.base.get_input_embeddings().register_forward_hook(lambda m, a, out: found.append(out))
    try:
        fused(**batch)
    finally:
        handle.remove()
    options = {**FIXED, "num_beams": beams, "suppress_tokens": list(fused.reserved.values())}
    base = fx.plain(architecture).generate(inputs_embeds=found[0], attention_mask=batch["attention_mask"], **options)
    assert new_ids(fused, num_beams=beams) == base.tolist()


@every_architecture
@every_bridge
def test_beams_see_their_own_rows_features(architecture: str, bridge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features expanded in another order than the ids (row, row, row … instead of each row's beams) are seen."""
    fused = fx.fused(architecture, bridge)
    items = [{"sign": x} for x in (-1.0, -0.3, 0.3, 1.0)]
    batch = fused.processor([fx.PROMPTS[0]] * 4, items)

    def scores(inputs: dict[str, Tensor]) -> Tensor:
        return fused.generate(**inputs, **{**STEPS, "num_beams": 3}).sequences_scores

    together = scores(batch)

    def alone(row: int) -> Tensor:
        return scores(fused.processor([fx.PROMPTS[0]], [items[row]]))

    assert torch.allclose(together, torch.cat([alone(row) for row in range(4)]), atol=1e-4)
    right = fused._expand_inputs_for_generation

    def wrong(expand_size: int = 1, **kwargs: Any) -> Any:
        ids, out = right(expand_size=expand_size, **kwargs)
        out["expert_features"] = kwargs["expert_features"].repeat(expand_size, 1, 1, 1)
        return ids, out

    monkeypatch.setattr(fused, "_expand_inputs_for_generation", wrong)
    assert not torch.allclose(scores(batch), together, atol=1e-4)


@every_bridge
def test_sampling_repeats_with_its_seed(bridge: str) -> None:
    fused = fx.fused("llama", bridge)

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return new_ids(fused, do_sample=True, temperature=1.5, top_k=0)

    first = sample(0)
    assert sample(0) == first
    assert any(sample(seed) != first for seed in (1, 2, 3))


def check_cache(fused: FusedModel) -> None:
    """Logits of every step are equal with the KV cache and with every position computed anew at every step."""
    batch, widths = batch_of(fused), []
    handle = fused.wire.layers[0].register_forward_hook(
        lambda m, a, out: widths.append((out[0] if isinstance(out, tuple) else out).shape[1])
    )
    try:
        cached = fused.generate(**batch, **STEPS)
        split = len(widths)
        anew = fused.generate(**batch, **STEPS, use_cache=False)
    finally:
        handle.remove()
    length = batch["input_ids"].shape[1]
    assert widths[:split] == [length] + [1] * (LENGTH - 1)
    assert widths[split:] == [length + step for step in range(LENGTH)]  # really off
    assert torch.equal(cached.sequences, anew.sequences)
    for a, b in zip(cached.logits, anew.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-3)


@every_architecture
@every_bridge
def test_cache_on_and_off_say_the_same(architecture: str, bridge: str) -> None:
    check_cache(fx.fused(architecture, bridge))


@every_architecture
@pytest.mark.parametrize("bridge", ["gated", "cross_attention"])
def test_features_dropped_while_decoding_are_seen(
    architecture: str, bridge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = fx.fused(architecture, bridge)
    right = fused.prepare_inputs_for_generation

    def dropped(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = right(*args, **kwargs)
        if inputs["input_ids"].shape[1] == 1:
            inputs = {key: value for key, value in inputs.items() if not key.startswith("expert_")}
        return inputs

    monkeypatch.setattr(fused, "prepare_inputs_for_generation", dropped)
    with pytest.raises(AssertionError):
        check_cache(fused)


@every_architecture
@torch.no_grad()
def test_decoding_by_hand_keeps_the_gate_open(architecture: str) -> None:
    """forward() with a KV cache and no `expert_active`, as a loop of one's own calls it."""
    fused = fx.fused(architecture, "gated")
    batch = fused.processor([fx.PROMPTS[0]], [fx.INPUTS[0]])
    whole = fused(**batch).logits[:, -1]
    experts = {key: value for key, value in batch.items() if key.startswith("expert_")}
    past = fused(input_ids=batch["input_ids"][:, :-1], use_cache=True, **experts).past_key_values
    last = fused(input_ids=batch["input_ids"][:, -1:], past_key_values=past, use_cache=True, **experts).logits[:, -1]
    assert torch.allclose(last, whole, atol=1e-3)


def check_penalty(fused: FusedModel) -> None:
    """Scores are the plain penalty of transformers on the whole row of ids, the prompt's with its reserved ids."""
    batch = batch_of(fused, (1,))
    out = fused.generate(**batch, **STEPS, repetition_penalty=1.7)
    length = batch["input_ids"].shape[1]
    penalty = RepetitionPenaltyLogitsProcessor(1.7)
    for step, (raw, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        expected = penalty(out.sequences[:, : length + step], raw.float().clone())
        kept = torch.isfinite(scores)  # the end of turn and the reserved ids are ruled out
        assert (~kept).sum(dim=1).tolist() == [1 + len(fused.reserved)]
        assert torch.equal(scores[kept], expected[kept])
        in_prompt = torch.zeros_like(kept).scatter_(1, batch["input_ids"], True) & kept & (raw != 0)
        assert in_prompt.any(dim=1).all()
        assert (scores[in_prompt] != raw[in_prompt]).all()


@every_architecture
@every_bridge
def test_repetition_penalty_sees_the_prompt(architecture: str, bridge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fx.fused(architecture, bridge)
    check_penalty(fused)
    right = RepetitionPenaltyLogitsProcessor.__call__

    class Blind(LogitsProcessor):
        """Sees only what was generated, as with `generate(inputs_embeds=…)`."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            start = batch_of(fused, (1,))["input_ids"].shape[1]
            out: Tensor = right(RepetitionPenaltyLogitsProcessor(1.7), input_ids[:, start:], scores)
            return out

    monkeypatch.setattr("transformers.generation.utils.RepetitionPenaltyLogitsProcessor", lambda *_, **__: Blind())
    with pytest.raises(AssertionError):
        check_penalty(fused)


@every_architecture
def test_reserved_ids_are_never_written_and_off_means_plain(architecture: str) -> None:
    fused = fx.fused(architecture, "gated")
    written = new_ids(fused, do_sample=True, temperature=100.0, top_k=0, max_new_tokens=60)
    assert not {i for row in written for i in row} & set(fused.reserved.values())
    batch = batch_of(fused)
    ordinary = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with fused.bridge_off():
        off = fused.generate(**batch, **STEPS)
    base = fx.plain(architecture).generate(**ordinary, **STEPS)
    assert torch.equal(off.sequences, base.sequences)
    assert all(torch.equal(a, b) for a, b in zip(off.scores, base.scores, strict=True))


@every_architecture
@pytest.mark.parametrize("beams", [1, 2])
def test_logit_answers_as_the_expert_decides(architecture: str, beams: int) -> None:
    fused = fx.fused(architecture, "logit")
    prompts = [fx.PROMPTS[0], "cards <|sign|> ", fx.PROMPTS[2]]
    answers = fused.answer(prompts, [{"sign": 0.5}, {"sign": -0.5}, {}], num_beams=beams)
    assert answers[:2] == ["yes", "no"]
    assert answers[2] == fused.answer([fx.PROMPTS[2]], num_beams=beams)[0]
    assert answers[2] not in ("yes", "no")


@every_architecture
def test_tool_answers_as_the_words_in_its_place(architecture: str) -> None:
    fused = fx.fused(architecture, "tool")
    words = fused.experts["sign"].describe([0.5])[0]
    told = fused.processor([fx.PROMPTS[0].replace("<|sign|>", words)])
    asked = fused.processor([fx.PROMPTS[0]], [{"sign": 0.5}])
    assert asked.keys() == told.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(asked["input_ids"], told["input_ids"])
    other = fused.processor([fx.PROMPTS[0]], [{"sign": -0.5}])["input_ids"]
    assert other.tolist() != told["input_ids"].tolist()
    base = fx.plain(architecture).generate(**told, **FIXED, suppress_tokens=list(fused.reserved.values()))
    assert torch.equal(fused.generate(**asked, **FIXED), base)


@every_architecture
@every_bridge
def test_what_prompts_share_is_computed_once(architecture: str, bridge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`answer` keeps the keys and values of a common beginning; other values there would be noticed."""
    fused = fx.fused(architecture, bridge)
    prompts, items = [fx.PROMPTS[0]] * 4, [{"sign": x} for x in (-1.0, -0.3, 0.3, 1.0)]
    alone = [fused.answer([prompt], [item], **FIXED)[0] for prompt, item in zip(prompts, items, strict=True)]
    reads: list[int] = []
    right = answering.common_prompt

    def counted(model: FusedModel, rows: Any) -> dict[str, Any]:
        found = right(model, rows)
        reads.append(found["past_key_values"].get_seq_length())
        return found

    monkeypatch.setattr(answering, "common_prompt", counted)
    assert fused.answer(prompts, items, **FIXED) == alone
    assert reads[0] > 0

    def wrong(model: FusedModel, rows: Any) -> dict[str, Any]:
        found = right(model, rows)
        for layer in found["past_key_values"].layers:
            layer.values = -10 * layer.values
        return found

    monkeypatch.setattr(answering, "common_prompt", wrong)
    assert fused.answer(prompts, items, **FIXED) != alone


def test_answer_gives_one_text_for_each_prompt() -> None:
    fused = fx.fused("llama", "prefix")
    with pytest.raises(InputError, match="call generate"):
        fused.answer([fx.PROMPTS[0]], [{"sign": 1.0}], num_return_sequences=2)
