"""How likely an LLM finds whole answers: the sum of log p(token | prompt, tokens before) to the end of turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.processor import Encoded
from model_fusion.fuse.shortcut import Shortcut


@torch.no_grad()
def answer_log_likelihood(
    fused: FusedModel,
    prompts: Sequence[str],
    inputs: Sequence[Mapping[str, Any]],
    answers: Sequence[str],
    *,
    batch_size: int = 64,
) -> Tensor:
    """float32 [B, C]: the log-likelihood of each of C answers, end of turn included, after each of B prompts.

    Raises InputError for the `logit` bridge, which acts on decoding and leaves the LLM's likelihoods as they are.
    """
    if fused.bridge.kind == "logit":
        raise InputError("the logit bridge changes decoding only, not likelihoods: use a trained bridge or tool")
    rows = fused.processor.encode(prompts, inputs)
    columns = []
    for answer in answers:
        ids = fused.processor.answer_ids(answer)
        whole = [Encoded([*row.ids, *ids], row.prompt_length, row.occurrences) for row in rows]
        shortcut = Shortcut(fused, whole)
        found = [
            sequence_log_likelihood(*shortcut.logits(whole[start : start + batch_size]))
            for start in range(0, len(whole), batch_size)
        ]
        columns.append(torch.cat(found))
    return torch.stack(columns, dim=1)


def sequence_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """float32 [B]: sum over labelled positions of log p(label) by the logits one position before.

    logits [B, K, V], labels int64 [B, K] with -100 where nothing is labelled.
    """
    targets = labels[:, 1:]
    keep = targets != -100
    log_p = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    taken = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(keep, taken, torch.zeros(())).sum(dim=1)
