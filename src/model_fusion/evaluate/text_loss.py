"""How well a causal LM predicts a text: nats a token, perplexity, and bits a byte, which no tokenizer can flatter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from model_fusion.errors import InputError


@dataclass(frozen=True)
class Judged:
    """Token ids to predict: windows [N, T] and one shorter tail [1, t], int64; `size`: the UTF-8 bytes they stand for.
    The first token of each row is given, not judged."""

    rows: tuple[Tensor, ...]
    size: int

    @property
    def tokens(self) -> int:
        return sum(part.shape[0] * (part.shape[1] - 1) for part in self.rows)


def judged(texts: Sequence[str], tokenizer: Any, window: int) -> Judged:
    """Documents cut into rows of up to `window` tokens. Raises InputError for less than two tokens."""
    rows: list[Tensor] = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
        whole = len(ids) // window * window
        rows += [part for part in (ids[:whole].view(-1, window), ids[whole:].view(1, -1)) if part.numel()]
    rows = [part for part in rows if part.shape[1] > 1]
    if not rows:
        raise InputError("a text of at least two tokens is needed to measure its loss")
    said = [text for part in rows for text in tokenizer.batch_decode(part[:, 1:], skip_special_tokens=False)]
    return Judged(tuple(rows), max(1, sum(len(text.encode()) for text in said)))


@torch.no_grad()
def nats(model: Any, text: Judged, *, batch_size: int = 8) -> float:
    """Sum of −ln p over the judged tokens."""
    total = 0.0
    for part in text.rows:
        for start in range(0, part.shape[0], batch_size):
            ids = part[start : start + batch_size].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return total


def loss(model: Any, text: Judged) -> float:
    """Nats a token."""
    return nats(model, text) / text.tokens


def perplexity(model: Any, text: Judged) -> float:
    """exp of the nats a token."""
    return math.exp(min(loss(model, text), 700.0))


def bits_per_byte(model: Any, text: Judged) -> float:
    """Bits a byte of UTF-8."""
    return nats(model, text) / math.log(2) / text.size


MEASURES = {"bits_per_byte": bits_per_byte, "loss": loss, "perplexity": perplexity}
"""Name → measure; lower is better."""
