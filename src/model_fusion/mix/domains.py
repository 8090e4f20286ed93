"""The texts a mixed model is trained and judged on: one domain an expert, as windows of token ids."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model_fusion.checkpoint import lineage
from model_fusion.checkpoint.reader import read_json
from model_fusion.errors import InputError
from model_fusion.recipe.reading import nearest
from model_fusion.training.texts import documents, rows, split, windows

Texts = Mapping[str, Iterable[Any]]


@dataclass(frozen=True)
class Domains:
    """name → windows [N, T] for training, and for judging; `sizes`: UTF-8 bytes that each name's judged tokens
    (all but a window's first) stand for."""

    train: dict[str, Tensor]
    held_out: dict[str, Tensor]
    sizes: dict[str, int]


def recipe_of(folder: Path) -> dict[str, Any]:
    """The recipe a mixed folder was built from. Raises `InputError` where there is none."""
    if not (folder / lineage.NAME).is_file():
        raise InputError(f"{folder}: no {lineage.NAME}; give a folder that `model-fusion mix build` wrote")
    record = read_json(folder / lineage.NAME)
    if record.get("kind") != "mix":
        raise InputError(f"{folder}: written by {record.get('kind')!r}, not by mix build")
    recipe: dict[str, Any] = record["recipe"]
    return recipe


def names_of(recipe: Mapping[str, Any]) -> list[str]:
    """The experts' names, in order."""
    return [entry.get("name") or f"expert{i}" for i, entry in enumerate(recipe["experts"])]


def gather(folder: Path, texts: Texts | Path | None) -> dict[str, list[str]]:
    """Documents of each expert's domain, in the experts' order.

    texts: rows a domain; or a folder with a sub-folder (or file) a domain; None takes the recipe's own texts.
    """
    recipe = recipe_of(folder)
    names = names_of(recipe)
    if texts is None:
        found = {
            n: documents(_beside(folder, e.get("texts", ()))) for n, e in zip(names, recipe["experts"], strict=True)
        }
    elif isinstance(texts, Path):
        if not texts.is_dir():
            raise InputError(f"{texts}: no such folder; give one with a sub-folder a domain ({', '.join(names)})")
        found = {p.stem if p.is_file() else p.name: documents([str(p)]) for p in sorted(texts.iterdir())}
    else:
        found = {name: rows(data) for name, data in texts.items()}
    odd = next((name for name in found if name not in names), None)
    if odd is not None:
        raise InputError(f"domain {odd!r} belongs to no expert; {nearest(odd, names)}")
    empty = next((name for name in names if not found.get(name)), None)
    if empty is not None:
        raise InputError(
            f"no text for expert {empty!r}: give a folder with a sub-folder a domain, or texts in the recipe"
        )
    return {name: found[name] for name in names}


def _beside(folder: Path, texts: Iterable[str]) -> list[str]:
    """The recipe's texts, which `mix build` tells from the folder's parent; else from where the command runs."""
    return [str(folder.parent / name) if (folder.parent / name).exists() else name for name in texts]


def prepare(texts: Mapping[str, list[str]], tokenizer: Any, length: int, limit: int | None) -> Domains:
    """Split by document and cut into windows. `limit`: at most so many training tokens a domain, a quarter judged."""
    train, held, sizes = {}, {}, {}
    for name, found in texts.items():
        kept, out = split(found)
        train[name] = windows(kept, tokenizer, length, limit)
        held[name] = windows(out, tokenizer, length, None if limit is None else limit // 4)
        judged = tokenizer.batch_decode(held[name][:, 1:], skip_special_tokens=True)
        sizes[name] = max(1, sum(len(text.encode()) for text in judged))
    return Domains(train, held, sizes)
