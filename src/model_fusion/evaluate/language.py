"""Does the fused model keep its language? Perplexity, divergence from the text oracle, samples of next turns.

The text oracle is the same LLM with the bridge off and the expert's `describe()` words pasted at its placeholder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.placeholders import placeholder, split
from model_fusion.fuse.processor import Messages

Inputs = Mapping[str, Any]
CONTINUATION = 24


def _text(name: str) -> str:
    return resources.files("model_fusion.evaluate").joinpath("texts", name).read_text(encoding="utf-8")


UNRELATED_PROMPTS: tuple[str, ...] = tuple(_text("unrelated_prompts.txt").splitlines())
"""50 questions that have nothing to do with any expert. They name none: see `beside`."""
ORDINARY_TEXT: str = _text("ordinary.txt")
"""About 3 kB of plain prose."""


def beside(prompts: Sequence[str], expert: str) -> list[str]:
    """Each prompt with the expert's placeholder on a line before it."""
    return [f"{placeholder(expert)}\n{prompt}" for prompt in prompts]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, text: str, *, window: int = 512) -> float:
    """exp of the mean negative log-likelihood of a token of `text`, read in windows that do not overlap; the first
    token of a window is not scored. `model` is any causal LM, a FusedModel included. Raises InputError for a text
    of less than two tokens."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
    total, count = 0.0, 0
    for start in range(0, ids.shape[1], window):
        piece = ids[:, start : start + window]
        if piece.shape[1] < 2:
            continue
        logits = model(input_ids=piece, use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum"))
        count += piece.shape[1] - 1
    if not count:
        raise InputError("perplexity needs a text of at least two tokens")
    return float(torch.tensor(total / count).exp())


@torch.no_grad()
def perplexity_beside(
    fused: FusedModel, prompt: str | Messages, inputs: Inputs, text: str, *, window: int = 512
) -> tuple[float, float]:
    """(of the fused model, of the text oracle): perplexity of `text`, read in windows, each as the answer to `prompt`,
    which names an expert. Without a placeholder an adapter or a gate does not act at all; here it does."""
    ids = fused.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [ids[start : start + window] for start in range(0, len(ids), window)]
    if not ids:
        raise InputError("perplexity needs a text")
    (told,) = oracle_prompts(fused, [prompt], [inputs])

    def of(asked: str | Messages, given: Sequence[Inputs] | None) -> float:
        total = sum(
            float(next_token_log_probs(fused, [asked], given, [piece])[0].gather(1, torch.tensor(piece)[:, None]).sum())
            for piece in pieces
        )
        return float(torch.tensor(-total / len(ids)).exp())

    beside = of(prompt, [inputs])
    with fused.bridge_off():
        return beside, of(told, None)


def oracle_prompts(
    fused: FusedModel, prompts: Sequence[str | Messages], inputs: Sequence[Inputs]
) -> list[str | Messages]:
    """The prompts (or conversations) with each placeholder replaced by what its expert says of its input."""
    return [_told(fused, prompt, given) for prompt, given in zip(prompts, inputs, strict=True)]


def _told(fused: FusedModel, prompt: str | Messages, given: Inputs) -> str | Messages:
    contents = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    pieces = [split(content, tuple(fused.experts)) for content in contents]
    found = [name for parts in pieces for kind, name in parts if kind == "expert"]
    words = {
        name: iter(expert.describe(given[name] if found.count(name) > 1 else [given[name]]))
        for name, expert in fused.experts.items()
        if name in found
    }
    texts = ["".join(next(words[c]) if kind == "expert" else c for kind, c in parts) for parts in pieces]
    if isinstance(prompt, str):
        return texts[0]
    return [{**message, "content": text} for message, text in zip(prompt, texts, strict=True)]


def kl_to_oracle(
    fused: FusedModel, prompts: Sequence[str | Messages], items: Sequence[Inputs], *, tokens: int = CONTINUATION
) -> float:
    """Mean over all tokens of KL(text oracle || fused model with the expert present) in nats, along the oracle's
    greedy continuation of up to `tokens` tokens. `prompts` hold placeholders, `items` are inputs by expert's name,
    as `FusedModel.answer` takes them."""
    return float(torch.cat(kl_by_prompt(fused, prompts, items, tokens=tokens)).mean())


@torch.no_grad()
def kl_by_prompt(
    fused: FusedModel,
    prompts: Sequence[str | Messages],
    items: Sequence[Inputs],
    *,
    tokens: int = CONTINUATION,
    batch_size: int = 16,
) -> list[Tensor]:
    """For each prompt KL(oracle || fused) in nats at each token of the oracle's continuation, float32 [n]."""
    told = oracle_prompts(fused, prompts, items)
    found: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        with fused.bridge_off():
            said = continuations(fused, told[rows], tokens)
            wanted = next_token_log_probs(fused, told[rows], None, said)
        got = next_token_log_probs(fused, prompts[rows], items[rows], said)
        found += [(p.exp() * (p - q)).sum(-1) for p, q in zip(wanted, got, strict=True)]
    return found


@torch.no_grad()
def continuations(
    fused: FusedModel, prompts: Sequence[str | Messages], tokens: int, inputs: Sequence[Inputs] | None = None
) -> list[list[int]]:
    """Greedy ids of up to `tokens` tokens after each prompt, the end of turn included where it comes."""
    batch = {key: value.to(fused.device) for key, value in fused.processor(prompts, inputs).items()}
    end = fused.tokenizer.eos_token_id
    out = fused.generate(
        **batch,
        max_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=fused.tokenizer.pad_token_id,
        suppress_tokens=list(fused.reserved.values()),  # the plain LLM may say them, a fused prompt may not hold them
    )
    rows = out[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


@torch.no_grad()
def next_token_log_probs(
    fused: FusedModel,
    prompts: Sequence[str | Messages],
    inputs: Sequence[Inputs] | None,
    following: Sequence[Sequence[int]],
) -> list[Tensor]:
    """Log-probabilities float32 [n, V] of each next token along `following` ids after each prompt."""
    rows = [
        replace(row, ids=[*row.ids, *ids])
        for row, ids in zip(fused.processor.encode(prompts, inputs), following, strict=True)
    ]
    batch = {key: value.to(fused.device) for key, value in fused.processor.collate(rows).items()}
    logits = fused(**batch, use_cache=False).logits
    return [
        logits[number, row.prompt_length - 1 : len(row.ids) - 1].float().log_softmax(-1).cpu()
        for number, row in enumerate(rows)
    ]


def next_turns(
    fused: FusedModel,
    first: str,
    prompts: Sequence[str],
    inputs: Sequence[Inputs],
    *,
    tokens: int = 32,
) -> list[dict[str, str]]:
    """Conversations: `first` (which names an expert) is asked and answered, then each of `prompts`. What is said to
    it by the fused model, and by the text oracle after the same first answer."""
    if fused.tokenizer.chat_template:
        answers = fused.answer([first] * len(prompts), inputs)
        asked: list[str | Messages] = [
            [
                {"role": "user", "content": first},
                {"role": "assistant", "content": answer},
                {"role": "user", "content": prompt},
            ]
            for answer, prompt in zip(answers, prompts, strict=True)
        ]
    else:
        asked = [f"{first}\n{prompt}" for prompt in prompts]
    says = fused.answer(asked, inputs, max_new_tokens=tokens)
    with fused.bridge_off():
        oracle = fused.answer(oracle_prompts(fused, asked, inputs), max_new_tokens=tokens)
    return [{"prompt": prompt, "fused": a, "oracle": b} for prompt, a, b in zip(prompts, says, oracle, strict=True)]


@torch.no_grad()
def identical_without_expert(fused: FusedModel, prompts: Sequence[str]) -> bool:
    """Are the logits of prompts that name no expert the plain base's, bit for bit, at equal shapes?"""
    batch = {key: value.to(fused.device) for key, value in fused.processor(prompts).items()}
    on = fused(**batch, use_cache=False).logits
    with fused.bridge_off():
        return bool(torch.equal(on, fused.base(**batch, use_cache=False).logits))
