"""Examples and requests from JSONL and CSV files (UTF-8, with or without the mark that spreadsheets put first), each
row checked against the experts' schemas."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from model_fusion.errors import InputError
from model_fusion.fuse.experts.schema import InputSchema
from model_fusion.fuse.fit import Example
from model_fusion.fuse.inputs import check_item, known, parse_item
from model_fusion.fuse.placeholders import PLACEHOLDER, placeholder
from model_fusion.recipe.reading import nearest

KEYS = ("prompt", "inputs", "answer")


def read_examples(
    file: Path,
    schemas: Mapping[str, InputSchema],
    *,
    prompt: str | None = None,
    answers: bool = True,
    prompts: bool = True,
) -> list[Example]:
    """The rows of a .jsonl file (`{"prompt", "inputs", "answer"}` a line) or a .csv file (columns prompt and answer,
    and one for each expert, with its input in words or JSON). `prompt` serves rows without their own; without
    `answers`, rows may lack one (""); without `prompts` too, and then have inputs alone. Raises InputError naming file
    and line."""
    read = {".jsonl": _jsonl, ".csv": _csv}.get(file.suffix.lower())
    if read is None:
        raise InputError(f"{file}: expected a .jsonl or .csv file")
    found = []
    try:
        for line, row in read(file, schemas):
            try:
                found.append(_example(row, schemas, prompt, answers, prompts))
            except InputError as error:
                raise InputError(f"{file}, line {line}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{file}: no such data file") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not UTF-8 text") from None
    if not found:
        raise InputError(f"{file}: holds no example; write one a line")
    return found


def _jsonl(file: Path, schemas: Mapping[str, InputSchema]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{file}, line {number}: not valid JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number}: expected an object with {', '.join(KEYS)}")
            yield number, row


def _csv(file: Path, schemas: Mapping[str, InputSchema]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        columns = ["prompt", "answer", *schemas]
        for column in reader.fieldnames or ():
            if column not in columns:
                raise InputError(f"{file}: unknown column {column!r}; {nearest(column, columns)}")
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{file}, line {reader.line_num}: has not {len(reader.fieldnames or ())} values")
            try:
                inputs = {name: parse_item(name, schemas[name], row[name]) for name in schemas if row.get(name)}
            except InputError as error:
                raise InputError(f"{file}, line {reader.line_num}: {error}") from None
            own = {key: row[key] for key in ("prompt", "answer") if row.get(key)}
            yield reader.line_num, {**own, "inputs": inputs}


def _example(
    row: Mapping[str, Any], schemas: Mapping[str, InputSchema], default: str | None, answers: bool, prompts: bool
) -> Example:
    for key in row:
        if key not in KEYS:
            raise InputError(f"unknown key {key!r}; {nearest(key, KEYS)}")
    prompt, inputs = row.get("prompt", default), row.get("inputs", {})
    answer = row.get("answer", "")
    if not isinstance(inputs, Mapping):
        raise InputError("inputs: expected an object from expert names to inputs")
    if prompt is None and not prompts:
        if not inputs:
            raise InputError("no input: give one for an expert")
        return Example("", {name: check_item(name, known(name, schemas), item) for name, item in inputs.items()}, "")
    if not isinstance(prompt, str) or not prompt:
        raise InputError("no prompt: give one in the row, or one for all rows as data.prompt")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise InputError(f"answer: expected a text, got {answer!r}")
    if answers and not str(answer).strip():
        raise InputError("no answer: give the text that the LLM shall say")
    return Example(prompt, checked_inputs(prompt, inputs, schemas), str(answer))


def checked_inputs(prompt: str, inputs: Mapping[str, Any], schemas: Mapping[str, InputSchema]) -> dict[str, Any]:
    """`inputs` checked against the schemas and the prompt's placeholders. Raises InputError."""
    for name in inputs:
        known(name, schemas)
    written = PLACEHOLDER.findall(prompt)
    for name in written:
        # A name that is no expert's may still be a token of the LLM: its tokenizer is asked later.
        if name not in schemas and (close := nearest(name, schemas)).startswith("did you mean"):
            raise InputError(f"unknown placeholder {placeholder(name)}: {close}")
    found: dict[str, Any] = {}
    for name, schema in schemas.items():
        count = written.count(name)
        if (count > 0) != (name in inputs):
            lacks = f"an input for expert {name!r}" if count else f"the placeholder {placeholder(name)}"
            raise InputError(f"the prompt and the inputs do not fit: {lacks} is missing")
        if count == 1:
            found[name] = check_item(name, schema, inputs[name])
        elif count:
            items = inputs[name]
            if not isinstance(items, list | tuple) or len(items) != count:
                raise InputError(f"{placeholder(name)} occurs {count} times: give a list of {count} inputs")
            found[name] = [check_item(name, schema, item) for item in items]
    return found
