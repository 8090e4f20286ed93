"""The text oracle as a teacher: the same LLM, bridge off, told the experts' words where their placeholders stand.

What it says to each distinct (prompt, words) is decoded once and kept with its next-token distributions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_fusion.fuse.answer import common_prompt
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.placeholders import placeholder
from model_fusion.fuse.processor import Encoded, Messages

Prompt = str | Messages


@dataclass(frozen=True)
class Continuation:
    """The oracle's greedy `ids` (n of them, its end of turn included) and, at each, its K likeliest next tokens:
    `top` int64 [n, K] with log-probabilities `log_probs` float32 [n, K]. The other tokens are one lump."""

    ids: list[int]
    top: Tensor
    log_probs: Tensor


class Teacher:
    """Continuations of up to `tokens` tokens, computed once for each (prompt, words)."""

    def __init__(self, fused: FusedModel, *, tokens: int = 12, top_k: int = 256) -> None:
        self.fused, self.tokens, self.top_k = fused, tokens, top_k
        self._known: dict[tuple[int, ...], Continuation] = {}

    def continuations(self, prompt: Prompt, words: Sequence[Mapping[str, str]]) -> list[Continuation]:
        """What the oracle says to `prompt` when told each of `words` (expert's name -> its words)."""
        rows = self.fused.processor.encode([told(prompt, w) for w in words])
        keys = [tuple(row.ids) for row in rows]
        unknown = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}
        for length in sorted({len(key) for key in unknown}):
            self._listen([row for row in unknown.values() if len(row.ids) == length])
        return [self._known[key] for key in keys]

    @torch.no_grad()
    def _listen(self, rows: Sequence[Encoded]) -> None:
        """Decode after `rows` of equal length."""
        fused, end = self.fused, self.fused.tokenizer.eos_token_id
        ids = torch.tensor([row.ids for row in rows], device=fused.device)
        with fused.bridge_off():
            out = fused.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=fused.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
                **common_prompt(fused, rows),
            )
        said = out.sequences[:, ids.shape[1] :].tolist()
        steps = [summary(logits, self.top_k) for logits in out.logits]
        for row, written in enumerate(said):
            n = written.index(end) + 1 if end in written else len(written)
            top, log_probs = (torch.stack([step[i][row] for step in steps[:n]]) for i in (0, 1))
            self._known[tuple(rows[row].ids)] = Continuation(written[:n], top, log_probs)


def told(prompt: Prompt, words: Mapping[str, str]) -> Prompt:
    """`prompt` with each expert's placeholder replaced by its words."""
    if not isinstance(prompt, str):
        return [{**m, "content": str(told(m["content"], words))} for m in prompt]
    for name, word in words.items():
        prompt = prompt.replace(placeholder(name), word)
    return prompt


def summary(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens int64 [..., k] and their log-probabilities float32 [..., k] of logits [..., V]."""
    log_probs, top = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return top, log_probs


def kl(top: Tensor, log_probs: Tensor, logits: Tensor) -> Tensor:
    """KL(teacher || student) in nats, float32 [n], of teacher `top` int64 [n, K] and `log_probs` float32 [n, K]
    and student logits [n, V], over K tokens and the lump of all others: never above the KL over the vocabulary."""
    own = logits.float().log_softmax(-1).gather(-1, top)
    named = (log_probs.exp() * (log_probs - own)).sum(-1)
    rest, own_rest = (torch.clamp(1 - x.exp().sum(-1), min=1e-6) for x in (log_probs, own))
    return named + rest * (rest.log() - own_rest.log())
