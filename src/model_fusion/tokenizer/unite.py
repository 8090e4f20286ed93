"""The output's tokenizer: a model's own, or the union of several, and tokens asked for by name.

A union keeps every id of its base. New tokens follow: first the ordinary ones of each model in order, then the
added ones, then those a recipe names. Ordinary tokens bring their BPE merges (after the base's own, so that they
act where the base would stop) or Unigram scores; without them no text would ever reach the new rows.
"""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from model_fusion.errors import InputError, IntegrityError
from model_fusion.tokenizer.table import VOCABULARY_FILES, TokenTable, read_object, read_table

_ID_FIELDS = ("id", "content", "single_word", "lstrip", "rstrip", "normalized", "special")


def unite(tables: Mapping[str, TokenTable], base: str, tokens: Iterable[str] = ()) -> TokenTable:
    """The union of `tables`, on top of `base`; `tokens` are added where no table has them.

    Raises `InputError` where two tokenizers are of different kinds, or one has no tokenizer.json.
    """
    own = tables[base]
    added: dict[str, dict[str, Any]] = {}
    ordinary: dict[str, str] = {}
    for name, table in tables.items():
        for token in sorted(table.ids, key=table.ids.__getitem__):
            if token in own.ids:
                continue
            if token in table.added:
                added.setdefault(token, table.added[token])
            else:
                ordinary.setdefault(token, name)
    words = [token for token in ordinary if token not in added]
    named = [*added, *(token for token in dict.fromkeys(tokens) if token not in {*own.ids, *added, *words})]
    if not words and not named:
        return own
    if own.raw is None:
        raise InputError(f"{base}: no tokenizer.json to add tokens to; save its fast tokenizer first")
    ids = own.ids | {token: own.length + i for i, token in enumerate([*words, *named])}
    records = own.added | {t: {**added.get(t, _plain(t)), "id": ids[t]} for t in named}
    raw = copy.deepcopy(own.raw)
    raw["added_tokens"] = [_record(r) for r in sorted(records.values(), key=lambda r: int(r["id"]))]
    givers = [_of_one_kind(own, base, tables[n], n) for n in dict.fromkeys(ordinary[t] for t in words)]
    _extend(raw["model"], ids, givers)
    return TokenTable(ids, records, raw)


def _plain(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"content": token, **flags, "normalized": True}


def _record(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record.get(key, False) for key in _ID_FIELDS}


def _kind(table: TokenTable) -> tuple[object, ...]:
    """What must agree for one tokenizer's ordinary tokens to mean something in another."""
    raw = table.raw or {}
    model = raw.get("model", {})
    bytewise = "ByteLevel" in json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])
    return (model.get("type"), bool(model.get("byte_fallback")), bytewise, model.get("continuing_subword_prefix") or "")


def _of_one_kind(own: TokenTable, base: str, other: TokenTable, name: str) -> dict[str, Any]:
    if other.raw is None:
        raise InputError(f"{name}: no tokenizer.json to take tokens from; save its fast tokenizer first")
    if _kind(own) != _kind(other):
        raise InputError(
            f"{name} and {base} have tokenizers of different kinds ({_kind(other)[0]}, {_kind(own)[0]}), which no "
            "union can join: set tokenizer_source to base or to a model"
        )
    model: dict[str, Any] = other.raw["model"]
    return model


def _extend(model: dict[str, Any], ids: Mapping[str, int], givers: Sequence[Mapping[str, Any]]) -> None:
    """Put every token into the model's own table under its id: a reader would number added tokens anew."""
    if isinstance(model["vocab"], dict):
        model["vocab"] = dict(sorted(ids.items(), key=lambda item: item[1]))
    else:
        scores = {token: score for giver in reversed(givers) for token, score in giver["vocab"]}
        scores |= dict(model["vocab"])
        lowest = min(scores.values()) - 10.0  # an added token is found before the model looks; never as a piece
        order = sorted(ids, key=ids.__getitem__)
        if [ids[token] for token in order] != list(range(len(order))):
            raise InputError("a Unigram tokenizer whose ids have gaps cannot be extended: use tokenizer_source: base")
        model["vocab"] = [[token, scores.get(token, lowest)] for token in order]
    if "merges" in model and givers:
        merges = dict.fromkeys(_pair(merge) for merge in model["merges"])
        for giver in givers:
            merges |= dict.fromkeys(p for p in map(_pair, giver["merges"]) if {*p, "".join(p)} <= ids.keys())
        model["merges"] = [list(pair) for pair in merges]


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge if isinstance(merge, list) else str(merge).split(" ", 1)
    return str(left), str(right)


def output_files(files: Mapping[str, bytes], table: TokenTable, where: str) -> dict[str, bytes]:
    """A folder's tokenizer files with `table` in place of its own vocabulary.

    Raises `IntegrityError` where the written tokenizer would not give every token its id.
    """
    if table.raw is None or table == read_table(files, where):
        return dict(files)
    result = {name: data for name, data in files.items() if name not in VOCABULARY_FILES}
    result["tokenizer.json"] = json.dumps(table.raw, ensure_ascii=False).encode()
    config = read_object(files, "tokenizer_config.json", where)
    if isinstance(config.get("added_tokens_decoder"), dict):
        decoder = {str(r["id"]): {k: v for k, v in _record(r).items() if k != "id"} for r in table.added.values()}
        config["added_tokens_decoder"] = decoder
        result["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    _check(result["tokenizer.json"], table)
    return result


def _check(data: bytes, table: TokenTable) -> None:
    from tokenizers import Tokenizer

    try:
        written = Tokenizer.from_str(data.decode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises plain Exception
        raise InputError(
            f"the united tokenizer cannot be read back ({error}): set tokenizer_source to a model"
        ) from error
    if written != table.ids:
        odd = min(token for token, _ in written.items() ^ table.ids.items())
        raise IntegrityError(
            f"the united tokenizer gives {odd!r} another id than planned: set tokenizer_source to a model"
        )
