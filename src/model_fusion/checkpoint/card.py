"""The model card (README.md) of an output, made from its lineage alone. Nothing in it was not recorded there.

The card is not hashed into the lineage (it names the lineage's hash), so its prose may be edited before publishing.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

NAME = "README.md"
_FLAGS = ("adapter", "masks", "unmasked")
"""Kinds that flags make, not a recipe file."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def build(lineage: bytes) -> bytes:
    """The card of a lineage file's bytes."""
    record = json.loads(lineage)
    licence, sentence = _licence(record["parents"])
    method = record["method"]
    adapter, ours = record["kind"] == "adapter", record["kind"] in ("twin", "masks")
    bases = record["recipe"].get("base") if adapter else None
    models = [parent["model"] for parent in record["parents"] if "statistics" not in parent]
    on_hub = _on_hub(record["parents"], [bases] if bases else models)
    relation = {"base_model": on_hub, "base_model_relation": "adapter" if adapter else "merge"}
    head = {
        **(relation if on_hub else {}),
        "library_name": "peft" if adapter else "model-fusion" if ours else "transformers",
        "tags": ["model-fusion", "lora" if adapter else "merge", method],
        "license": licence,
    }
    names = [f"`{_published(model)}`" for model in models]
    title = record["recipe"].get("name") or f"{method} of {_listed([name.strip('`') for name in names])}"
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip() + "\n---",
        f"# {title}",
        f"Made from {_listed(names)} by `{method}` with model-fusion {record['versions']['model_fusion']}. "
        + ("Beyond what the notes under Method say, the tool" if record["notes"] else "The tool")
        + " measured nothing about what this model can do.",
        "## Parents\n\n" + _table(("model", "revision", "licence", "SHA-256 of the tensors read"), _rows(record)),
        sentence,
        "## Method\n\n" + _parameters(record),
        *(["\n".join(f"- {note}" for note in record["notes"])] if record["notes"] else []),
        *([] if record["kind"] in _FLAGS else [f"Recipe (`recipe.yml`):\n\n```yaml\n{_recipe(record['recipe'])}\n```"]),
        "## Reproduce\n\n" + _reproduce(record),
        "## Verify\n\n```bash\nmodel-fusion verify FOLDER\n```\n\n"
        "recomputes the hash of every tensor and file, and of the parents where they are at hand. "
        f"SHA-256 of `model_fusion.json`: `{hashlib.sha256(lineage).hexdigest()}`",
    ]
    return ("\n\n".join(parts) + "\n").encode()


def _published(model: str) -> str:
    """A model's text without the folders above it on the machine that made it: hub ids stay whole."""
    parts = model.split("+")
    local = [part.startswith((".", "/", "~")) or part.count("/") > 1 for part in parts]
    return "+".join(
        part.rstrip("/").rpartition("/")[2] if own else part for part, own in zip(parts, local, strict=True)
    )


def _on_hub(parents: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[str]:
    """The models that came from the hub, as it calls them: it takes no card that names others as its bases."""
    revisions = {parent["model"]: parent["revision"] for parent in parents}
    # a merge of adapters knows their base by name alone
    return [
        model.partition("+")[0].partition("@")[0]
        for model in models
        if revisions.get(model) or (model not in revisions and _HUB_ID.fullmatch(model))
    ]


def _licence(parents: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The front matter's licence and a sentence that says where it comes from."""
    found = [licence for parent in parents for licence in parent["licences"]]
    named = sorted({licence for licence in found if licence})
    if len(named) == 1 and None not in found:
        return named[0], f"Every parent is under `{named[0]}`, and so is this model."
    if not named:
        return "other", "No parent names its licence: ask their authors before you publish or use this model."
    which = _listed([f"`{name}`" for name in named])
    if None in found:
        return "other", f"Some parents are under {which}, others name no licence: the terms of all of them apply."
    return "other", f"The parents are under {which}: the terms of all of them apply at once."


def _rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            _published(parent["model"]),
            parent["revision"] or "–",
            ", ".join(licence or "not named" for licence in parent["licences"]) or "–",
            f"`{parent['sha256']}`",
        )
        for parent in record["parents"]
    ]


def _parameters(record: Mapping[str, Any]) -> str:
    recipe = record["recipe"]
    if record["kind"] in _FLAGS:
        return "Settings: " + ", ".join(f"{key} {_plain(value)}" for key, value in recipe.items()) + "."
    whole, parts = recipe.get("parameters", {}), _part_parameters(recipe)
    rows = []
    for name in dict.fromkeys([*record["defaults"], *whole, *sorted(parts)]):
        if name in parts:
            rows.append((name, "of each part", "recipe, below"))
        elif name in whole:
            rows.append((name, _plain(whole[name]), "recipe"))
        else:
            rows.append((name, _plain(record["defaults"][name]), "default"))
    if record["kind"] in ("mix", "twin"):
        return f"`{record['method']}`: the notes and the recipe say all."
    if not rows:
        return f"`{record['method']}` takes no parameters."
    return f"`{record['method']}`, seed {record['seed']}.\n\n" + _table(("parameter", "value", "from"), rows)


def _part_parameters(recipe: Any, top: bool = True) -> set[str]:
    """Names of the parameters that models, slices, sources or modules set for themselves."""
    if isinstance(recipe, list):
        return {name for item in recipe for name in _part_parameters(item, False)}
    if not isinstance(recipe, Mapping):
        return set()
    own = set() if top else set(recipe.get("parameters") or {})
    return own | {n for key, item in recipe.items() if key != "parameters" for n in _part_parameters(item, False)}


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list) else str(value)


def _recipe(recipe: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(_without_empty(recipe), sort_keys=False, allow_unicode=True)).strip()


def _without_empty(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_empty(item) for key, item in value.items() if item not in ({}, None)}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def _reproduce(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name.replace('_', '-')} {version}" for name, version in record["versions"].items())
    return (
        f"```bash\n{record['command']}\n```\n\nWith {versions}. The number of threads changes no byte; another "
        "version of torch may change the last bits."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
