"""Questions for a saved fusion, checked against its config before the LLM is loaded, and their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model_fusion.errors import InputError
from model_fusion.fuse.data import checked_inputs, read_examples
from model_fusion.fuse.experts.schema import InputSchema
from model_fusion.fuse.inputs import parse_pairs
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.placeholders import PLACEHOLDER


@dataclass(frozen=True)
class Question:
    """A prompt with the experts' checked inputs."""

    prompt: str
    inputs: Mapping[str, Any]


def questions(
    schemas: Mapping[str, InputSchema],
    *,
    prompt: str | None = None,
    inputs: Sequence[str] = (),
    file: Path | None = None,
) -> list[Question]:
    """One question from `prompt` and NAME=VALUE `inputs`, or those of a JSONL or CSV file. Raises InputError."""
    if (prompt is None) == (file is None):
        raise InputError("give either --prompt or --prompts FILE (one of them, not both)")
    if file is not None:
        if inputs:
            raise InputError("--input belongs to --prompt; in a file each row has its own inputs")
        return [Question(row.prompt, row.inputs) for row in read_examples(file, schemas, answers=False)]
    assert prompt is not None
    found = {name: items if len(items) > 1 else items[0] for name, items in parse_pairs(list(inputs), schemas).items()}
    return [Question(prompt, checked_inputs(prompt, found, schemas))]


def ask(
    fused: FusedModel,
    asked: Sequence[Question],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    bridge_off: bool = False,
    **options: Any,
) -> list[str]:
    """The answers in words: greedy at temperature 0, else sampled with `seed`. With `bridge_off` the plain LLM
    answers, and placeholders are left out of the prompts."""
    options |= generation(max_new_tokens, temperature)
    torch.manual_seed(seed)
    if not bridge_off:
        return fused.answer([q.prompt for q in asked], [q.inputs for q in asked], **options)
    with fused.bridge_off():
        return fused.answer([without(q.prompt, fused) for q in asked], **options)


def generation(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Options of `FusedModel.answer`: greedy at temperature 0, else sampled. Raises InputError."""
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}: give at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"--temperature {temperature}: give 0 (greedy) or a number above it")
    if temperature == 0:
        return {"max_new_tokens": max_new_tokens}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature}


def without(text: str, fused: FusedModel) -> str:
    """`text` with the experts' placeholders taken out."""
    return PLACEHOLDER.sub(lambda m: "" if m.group(1) in fused.experts else m.group(0), text).strip()
