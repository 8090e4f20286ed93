"""Greedy answers to many prompts that begin alike: the LLM reads the common beginning once.

Exact up to the arithmetic of the dtype: attention is causal, and no bridge acts before its expert's placeholder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.shortcut import expanded, shared_prompt

BATCH = 64
LEAST = 8
"""Beginnings of fewer tokens are not worth a pass of their own."""


@torch.no_grad()
def answers(
    model: FusedModel, prompts: Sequence[str], inputs: Sequence[Mapping[str, Any]], *, max_new_tokens: int = 16
) -> list[str]:
    """What `model.answer` says to each prompt. Rows are grouped by length, so that no row is padded."""
    rows = model.processor.encode(prompts, inputs)
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(len(row.ids), []).append(number)
    found = [""] * len(rows)
    for members in groups.values():
        shared = shared_prompt([rows[i] for i in members], set(model.reserved.values())) if len(members) > 1 else 0
        cache = _read(model, rows[members[0]].ids[:shared]) if shared >= LEAST else None
        for start in range(0, len(members), BATCH):
            part = members[start : start + BATCH]
            extra = {} if cache is None else {"past_key_values": expanded(cache, len(part))}
            texts = model.answer(
                [prompts[i] for i in part], [inputs[i] for i in part], max_new_tokens=max_new_tokens, **extra
            )
            for i, text in zip(part, texts, strict=True):
                found[i] = text
    return found


def _read(model: FusedModel, ids: Sequence[int]) -> Any:
    """The keys and values of the beginning, for one row. Adapters stay as they are."""
    return model.base(input_ids=torch.tensor([ids], device=model.device), use_cache=True).past_key_values
