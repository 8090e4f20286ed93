"""Answers in words to many prompts at once: grouped by length, what they have in common computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList

from model_fusion.errors import InputError
from model_fusion.fuse.bridges import Logit
from model_fusion.fuse.bridges.untrained import AnswerBias
from model_fusion.fuse.experts.base import ClassDecision
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.processor import Encoded, Messages
from model_fusion.fuse.shortcut import expanded, shared_prompt


@torch.no_grad()
def answer(
    fused: FusedModel,
    prompts: Sequence[str | Messages],
    inputs: Sequence[Mapping[str, Any]] | None,
    *,
    max_new_tokens: int,
    batch_size: int,
    **options: Any,
) -> list[str]:
    """One text for each prompt; `options` as `generate` takes them. Raises InputError."""
    if options.get("num_return_sequences", 1) != 1:
        raise InputError("answer gives one text for each prompt: call generate for num_return_sequences")
    processor, tokenizer = fused.processor, fused.tokenizer
    rows = processor.encode(prompts, inputs)
    longest = max((len(row.ids) for row in rows), default=0)
    if fused.context and longest + max_new_tokens > fused.context:
        raise InputError(
            f"a prompt has {longest} tokens and its answer may take {max_new_tokens}, the LLM reads {fused.context}: "
            "shorten the prompt, or ask for fewer new tokens"
        )
    settings = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }
    if not settings["do_sample"]:
        settings |= {"temperature": None, "top_p": None, "top_k": None}
    shares = settings.get("num_beams", 1) == 1 and settings.get("use_cache", True)
    bias = answer_bias(fused, inputs, [len(row.occurrences) for row in rows])
    texts = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row].ids))
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        taken = [rows[row] for row in chosen]
        batch = {k: v.to(fused.device) for k, v in processor.collate(taken, left=True).items()}
        length = batch["input_ids"].shape[1]
        extra: dict[str, Any] = common_prompt(fused, taken) if shares else {}
        if bias:
            extra["logits_processor"] = LogitsProcessorList([bias(chosen, length)])
        out = fused.generate(**batch, **settings, **extra)
        said = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        for row, text in zip(chosen, said, strict=True):
            texts[row] = text.strip()
    return texts


@torch.no_grad()
def common_prompt(fused: FusedModel, rows: Sequence[Encoded]) -> dict[str, Any]:
    """Keys and values of the ids that open all `rows` before any placeholder, computed once, for `generate`."""
    equal = len({len(row.ids) for row in rows}) == 1
    shared = shared_prompt(rows, set(fused.reserved.values())) if equal and len(rows) > 1 else 0
    if not shared:
        return {}
    ids = torch.tensor([rows[0].ids[:shared]], device=fused.device)
    with fused.bridge_off():  # no bridge acts before a placeholder
        cache = fused.base(input_ids=ids, use_cache=True).past_key_values
    return {"past_key_values": expanded(cache, len(rows))}


def answer_bias(
    fused: FusedModel, inputs: Sequence[Mapping[str, Any]] | None, counts: Sequence[int]
) -> Callable[[Sequence[int], int], AnswerBias] | None:
    """For the `logit` bridge: a maker of logits processors for chosen rows. counts: each row's placeholders; of
    several (a conversation) the last one speaks."""
    config = fused.fusion.config
    if not isinstance(config, Logit) or inputs is None or not fused.enabled:
        return None
    if len(fused.experts) != 1:
        raise InputError("the logit bridge answers for one expert; this model has several")
    (name, expert), processor = next(iter(fused.experts.items())), fused.processor
    have = [row for row, count in enumerate(counts) if count]
    if not have:
        return None
    decision = expert.decide([inputs[r][name] if counts[r] == 1 else inputs[r][name][-1] for r in have])
    if not isinstance(decision, ClassDecision):
        raise InputError("the logit bridge needs a classifier: a value has no class names to bias")
    log_probs = torch.full((len(counts), len(decision.classes)), float("nan"))
    log_probs[have] = decision.log_probs
    answers = [processor.answer_ids(name) for name in decision.classes]
    return lambda chosen, length: AnswerBias(answers, log_probs[list(chosen)].to(fused.device), length, config)
