"""A command line written for mergekit-yaml, as words of `model-fusion merge`. Knows flags, no recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from model_fusion.errors import InputError

_SAME = {"--cuda": ["--device", "cuda"], "--gpu-rich": ["--device", "cuda"]}
_VALUE_SAME = {"-j": "--threads", "--num-threads": "--threads"}
_NOT_NEEDED = {
    "--allow-crimes", "--copy-tokenizer", "--lazy-unpickle", "--low-cpu-memory", "--read-to-gpu", "--multi-gpu",
    "--async-write", "--clone-tensors", "--write-model-card", "--safe-serialization", "--quiet", "-v", "-vv",
    "--verbose",
}  # fmt: skip
"""What is always so here, or changes how mergekit works and not what it makes."""
_DEFAULT_OFF = {
    "--no-allow-crimes", "--no-cuda", "--no-lazy-unpickle", "--no-low-cpu-memory", "--no-read-to-gpu", "--no-multi-gpu",
    "--no-async-write", "--no-clone-tensors", "--no-quiet", "--no-unsafe-truncate-embeddings",
}  # fmt: skip
_VALUE_NOT_NEEDED = {"--lora-merge-cache", "--lora-merge-dtype", "--write-threads"}
_INSTEAD = {
    "--unsafe-truncate-embeddings": "set `tokenizer_source: base` in the recipe, which merges embeddings by token",
    "--no-copy-tokenizer": "the tokenizer is always written; delete its files if you do not want them",
    "--no-write-model-card": "the model card is always written; delete README.md if you do not want it",
    "--no-safe-serialization": "weights are always written as safetensors",
    "--transformers-cache": "set the environment variable HF_HUB_CACHE to that folder",
    "--random-seed": "write `seed: {value}` in the recipe, which the output then records",
    "--out-shard-size": "it counts parameters; give --shard-size in bytes (a parameter in bfloat16 takes 2)",
}


def translated(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words for `merge`, and those left out because they change nothing here.

    Raises `InputError` that says what to do instead of a flag that has no counterpart.
    """
    kept: list[str] = []
    dropped: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, equals, given = word.partition("=") if word.startswith("--") else (word, "", "")
        if flag in _SAME:
            kept += _SAME[flag]
        elif flag in _VALUE_SAME:
            kept += [_VALUE_SAME[flag], *([given] if equals else [])]
        elif flag in _NOT_NEEDED or flag in _DEFAULT_OFF:
            dropped.append(flag)
        elif flag in _VALUE_NOT_NEEDED:
            dropped.append(flag)
            rest = rest if equals else rest[1:]
        elif flag in _INSTEAD:
            value = given if equals else next(iter(rest), "N")
            raise InputError(f"{flag} of mergekit: {_INSTEAD[flag].format(value=value)}")
        else:
            kept.append(word)
    return kept, dropped


class MergekitCommand(TyperCommand):
    """A command that also takes mergekit's flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        kept, dropped = translated(args)
        ctx.meta["dropped"] = dropped
        parsed: list[str] = super().parse_args(ctx, kept)
        return parsed
