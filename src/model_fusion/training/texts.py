"""Text of a domain: files and folders, or any rows of text; split by document into training and held-out parts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_fusion.errors import InputError

_HELD_OUT = 5  # every fifth document is held out


def documents(names: Iterable[str], relative_to: Path | None = None) -> list[str]:
    """The text of each file; a folder stands for all files under it, sorted. Raises `InputError`."""
    found: list[str] = []
    for name in names:
        path = Path(name).expanduser()
        if relative_to is not None and not path.is_absolute() and not path.exists():
            path = relative_to / path
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path}: an empty folder; give a folder or file of text")
        for file in files:
            try:
                found.append(file.read_text(encoding="utf-8"))
            except OSError as error:
                raise InputError(f"no such text: {file} ({error.strerror})") from error
            except UnicodeDecodeError as error:
                raise InputError(f"{file}: not UTF-8 text") from error
    return found


def rows(data: Iterable[Any]) -> list[str]:
    """Documents of any rows: strings, or mappings with a `text` (a `datasets.Dataset` is such rows)."""
    found = []
    for row in data:
        text = row.get("text") if isinstance(row, Mapping) else row
        if not isinstance(text, str):
            raise InputError(f"a row of text is {type(row).__name__} without `text`: give strings or rows with `text`")
        found.append(text)
    return found


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """(training, held out) by document; one document alone is cut at four fifths."""
    if len(texts) == 1:
        cut = len(texts[0]) * (_HELD_OUT - 1) // _HELD_OUT
        return [texts[0][:cut]], [texts[0][cut:]]
    kept = [t for i, t in enumerate(texts) if i % _HELD_OUT != _HELD_OUT - 1]
    out = [t for i, t in enumerate(texts) if i % _HELD_OUT == _HELD_OUT - 1]
    return (kept, out) if out else (texts[:-1], texts[-1:])


def windows(texts: Iterable[str], tokenizer: Any, length: int, limit: int | None = None) -> Tensor:
    """Token ids [N, length], int64: documents joined by the end-of-text token, cut into windows; the rest is left.

    limit: at most so many tokens, taken evenly from the documents, so that a long first one does not fill it.
    """
    chosen = list(texts)
    share = None if limit is None else -(-max(limit, length) // max(len(chosen), 1))
    ids: list[int] = []
    end = tokenizer.eos_token_id
    for text in chosen:
        part = text if share is None else text[: share * 12]  # no tokenizer here needs 12 characters a token
        one = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        ids += one[:share] + ([end] if end is not None else [])
    if limit is not None:
        ids = ids[: max(limit, length)]
    count = len(ids) // length
    if count == 0:
        raise InputError(f"a domain's text has {len(ids)} tokens, fewer than one window of {length}: give more text")
    return torch.tensor(ids[: count * length]).view(count, length)
