"""Reserved token ids: which id of a frozen vocabulary stands for an expert's placeholder, and how text is split."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from model_fusion.errors import InputError

PLACEHOLDER = re.compile(r"<\|([A-Za-z_][\w.-]*)\|>")


def placeholder(name: str) -> str:
    """The text that stands for expert `name` in a prompt: `<|name|>`."""
    return f"<|{name}|>"


def check_names(names: Iterable[str], tokenizer: Any = None) -> None:
    """Raise InputError for an expert's name that a prompt cannot hold, or (with a tokenizer) that is the name of one
    of the LLM's own tokens."""
    own = str(getattr(tokenizer, "chat_template", None) or "")
    special = set(tokenizer.all_special_tokens) if tokenizer is not None else set()
    for name in names:
        if "." in name or not PLACEHOLDER.fullmatch(placeholder(name)):
            raise InputError(f"expert name {name!r}: use letters, digits, '_' and '-', beginning with a letter a to z")
        if placeholder(name) in special or placeholder(name) in own:
            raise InputError(f"expert name {name!r}: {placeholder(name)} is this LLM's own token; choose another name")


def reserve_ids(tokenizer: Any, rows: int, count: int) -> list[int]:
    """`count` token ids of a vocabulary with `rows` embedding rows that ordinary text does not produce.

    In this order: embedding rows beyond the tokenizer, added special tokens with no role, and, where a vocabulary
    has neither (GPT-2), its last ordinary tokens. The processor refuses a text that contains one.
    """
    size = len(tokenizer)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    roles = set(
        tokenizer.convert_tokens_to_ids(
            [t for t in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) if t]
        )
    )
    added = [
        index
        for index, token in sorted(tokenizer.added_tokens_decoder.items(), reverse=True)
        if token.special and index not in roles and token.content not in template and index < rows
    ]
    taken = roles | set(tokenizer.added_tokens_decoder)
    ordinary = (index for index in range(min(size, rows) - 1, -1, -1) if index not in taken)
    found: list[int] = [*range(size, rows), *added][:count]
    while len(found) < count:
        found.append(next(ordinary))
    return found


def check_placeholders(text: str, experts: Sequence[str], special: Iterable[str]) -> None:
    """Raise InputError for `<|name|>` in a user's text that is neither an expert nor one of the tokenizer's tokens."""
    known = set(special)
    for match in PLACEHOLDER.finditer(text):
        name = match.group(1)
        if name not in experts and match.group(0) not in known:
            near = difflib.get_close_matches(name, experts, n=1)
            hint = (
                f"did you mean {placeholder(near[0])}?"
                if near
                else f"the experts are {', '.join(map(placeholder, experts))}"
            )
            raise InputError(f"unknown placeholder {match.group(0)}: {hint}")


def split(text: str, experts: Sequence[str]) -> list[tuple[str, str]]:
    """`text` as pieces ("text", words) and ("expert", name), in order."""
    pieces: list[tuple[str, str]] = []
    end = 0
    for match in PLACEHOLDER.finditer(text):
        if match.group(1) in experts:
            pieces += [("text", text[end : match.start()]), ("expert", match.group(1))]
            end = match.end()
    pieces.append(("text", text[end:]))
    return [piece for piece in pieces if piece[1]]
