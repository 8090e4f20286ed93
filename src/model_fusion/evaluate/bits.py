"""Bits per byte of one text under causal LMs of different vocabularies, and under the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from model_fusion.errors import InputError


class Reader(Protocol):
    """A model, its tokenizer and its weight in the mean."""

    model: Any
    tokenizer: Any
    weight: float


def bits_per_byte(readers: Sequence[Reader], text: str, *, window: int = 2000) -> tuple[list[float], float]:
    """(each reader's, the mean's) bits per byte of `text`, read in pieces of `window` characters.

    Between two places where every tokenizer has a boundary, a reader's probability is the product over its own
    tokens; the mean's is the weighted mean of these. The first stretch of a piece has no context for models without
    a start token, and is not counted for any. Raises InputError for a text without a common boundary."""
    weights = torch.tensor([reader.weight for reader in readers], dtype=torch.float64)
    logs = (weights / weights.sum()).log()
    own, mean, size = [0.0] * len(readers), 0.0, 0
    for start in range(0, len(text), window):
        piece = text[start : start + window]
        found = [_ends(reader, piece) for reader in readers]
        common = sorted(set.intersection(*(set(ends) for ends in found)))
        if len(common) < 2:
            continue
        table = torch.tensor([_stretches(ends, common) for ends in found], dtype=torch.float64)
        own = [total - float(row.sum()) for total, row in zip(own, table, strict=True)]
        mean -= float((table + logs[:, None]).logsumexp(0).sum())
        size += len(piece[common[0] : common[-1]].encode())
    if not size:
        raise InputError("the text has no place where all tokenizers have a boundary: give a longer one")
    return [value / size / math.log(2) for value in own], mean / size / math.log(2)


@torch.no_grad()
def _ends(reader: Reader, piece: str) -> dict[int, float]:
    """Where tokens end, in characters → the summed log-probability of the tokens that end there."""
    encoded = reader.tokenizer(piece, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if len(ids) < 2:
        return {}
    given = torch.tensor([ids], device=reader.model.device)
    logits = reader.model(input_ids=given, use_cache=False).logits[0, :-1].float()
    scores = logits.log_softmax(-1).gather(-1, given[0, 1:, None])[:, 0].tolist()
    out: dict[int, float] = {}
    for (begin, end), score in zip(offsets, [0.0, *scores], strict=True):
        if end > begin:
            out[end] = out.get(end, 0.0) + score
    return out


def _stretches(ends: dict[int, float], common: Sequence[int]) -> list[float]:
    """The log-probability between each two neighbours in `common`."""
    out, place = [0.0] * (len(common) - 1), 0
    for end in sorted(ends):
        if end <= common[0]:
            continue
        while end > common[place + 1]:
            place += 1
            if place + 1 >= len(common):
                return out
        out[place] += ends[end]
    return out
