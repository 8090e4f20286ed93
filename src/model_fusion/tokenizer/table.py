"""A tokenizer's token → id table, read from its files without a tokenizer library. Knows no weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from model_fusion.errors import InputError

VOCABULARY_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.bpe", "bpe.codes",
    "tiktoken.model", "qwen.tiktoken",
)  # fmt: skip
"""Files that hold a vocabulary: all of them change, or go, when the vocabulary does."""


@dataclass(frozen=True)
class TokenTable:
    """`ids` holds every token, added ones included; `added` their records (content, special, lstrip …);
    `raw` is tokenizer.json, where there is one."""

    ids: dict[str, int]
    added: dict[str, dict[str, Any]] = field(default_factory=dict)
    raw: dict[str, Any] | None = None

    @property
    def length(self) -> int:
        """One more than the highest id: the fewest rows an embedding can have."""
        return max(self.ids.values(), default=-1) + 1


def read_object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """A JSON object of `files`, empty if absent. Raises `InputError` naming the file."""
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}/{name}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}/{name}: expected a JSON object")
    return value


def read_table(files: Mapping[str, bytes], where: str) -> TokenTable | None:
    """The table of a folder's small files; None where no file can be read as one.

    Raises `InputError` (starting with `where`) for a damaged file, or two tokens that share an id.
    """
    raw = read_object(files, "tokenizer.json", where)
    model = raw.get("model") if raw else None
    table: Any = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(table, list):  # Unigram: [token, score] in order of id
        table = {str(item[0]): i for i, item in enumerate(table)}
    if not isinstance(table, dict):
        table = read_object(files, "vocab.json", where) | read_object(files, "added_tokens.json", where)
        raw = {}
    if not table:
        return None
    records = [(t.get("id"), t) for t in raw.get("added_tokens") or [] if isinstance(t, dict)]
    decoder = read_object(files, "tokenizer_config.json", where).get("added_tokens_decoder")
    if isinstance(decoder, dict):
        listed = {t.get("content") for _, t in records}
        extra = [(int(i), t) for i, t in decoder.items() if isinstance(t, dict) and str(i).isdigit()]
        records += [(i, t) for i, t in extra if t.get("content") not in listed]
    added = {t["content"]: {**t, "id": i} for i, t in records if isinstance(t.get("content"), str)}
    ids = {**table, **{token: record["id"] for token, record in added.items()}}
    if not all(isinstance(i, int) and i >= 0 for i in ids.values()):
        raise InputError(f"{where}: a token of its vocabulary has no whole number as id")
    if len(set(ids.values())) < len(ids):
        owner: dict[int, str] = {}
        pair = next((owner[i], t) for t, i in ids.items() if owner.setdefault(i, t) != t)
        raise InputError(f"{where}: tokens {pair[0]!r} and {pair[1]!r} share id {ids[pair[1]]}")
    return TokenTable(ids, added, raw or None)
