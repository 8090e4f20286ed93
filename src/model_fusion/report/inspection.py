"""The tables of `inspect`, from its plain data. Knows no tensor."""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_DEFINITIONS = (
    "Δ/base: norm of the task vector over the base's. rank: median number of singular values above what rounding to "
    "the storage dtype makes. cos, conflict: cosine of two task vectors; share of the elements changed by both whose "
    "signs differ. overlap: mean cos² of the principal angles of the leading output subspaces, by randomized SVD, "
    "± its error bound; by chance it would be as given in brackets."
)
_WITHOUT_BASE = "Without --base: cosines and conflicts are of the weights themselves."
_PAIRS = 3


def show(data: Mapping[str, Any], console: Console | None = None) -> None:
    """Print models, what does not fit, warnings, and the numbers by role and by layer."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=150)
    base = data["base"]
    names = [model["model"] for model in data["models"] if model["model"] != base]
    letters = {name: ascii_uppercase[i] if i < 26 else f"M{i}" for i, name in enumerate(names)}
    console.print(_models(data["models"], letters, base))
    for kind, style in (("problems", "red"), ("warnings", "yellow")):
        for text in data[kind]:
            console.print(f"[{style}]{'does not fit' if kind == 'problems' else 'warning'}[/]: {escape(text)}")
    for title in ("by role", "by layer"):
        console.print(_group(title, data["groups"][title], data["groups"]["total"], names, letters, base is not None))
    console.print(_DEFINITIONS if base is not None else _WITHOUT_BASE, style="dim")


def _models(models: Sequence[Mapping[str, Any]], letters: Mapping[str, str], base: str | None) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "model", "architecture", "parameters", "GB", "dtype", "vocabulary", "licence"):
        table.add_column(name, justify="right" if name in ("parameters", "GB") else "left")
    for model in models:
        letter = "base" if model["model"] == base else letters[model["model"]]
        count = "–" if model["vocabulary"] is None else f"{model['vocabulary']:,} {model['vocabulary_is'] or ''}"
        licence = ", ".join(text or "not named" for text in model["licences"])
        sizes = f"{model['parameters']:,}", f"{model['bytes'] / 1e9:.3f}"
        words = [escape(model["model"]), model["architecture"] or "–", *sizes, " ".join(model["dtypes"])]
        table.add_row(letter, *words, count, escape(licence))
    return table


def _group(
    title: str,
    rows: Mapping[str, Any],
    total: Mapping[str, Any],
    names: Sequence[str],
    letters: Mapping[str, str],
    based: bool,
) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(title.removeprefix("by "))
    table.add_column("parameters", justify="right")
    spectral = any("rank" in row["models"][name] for row in rows.values() for name in names)
    if based:
        for name in names:
            table.add_column(f"Δ/base {letters[name]}", justify="right")
            if spectral:
                table.add_column(f"rank {letters[name]}", justify="right")
    overlapping = any("overlap of outputs" in pair for row in rows.values() for pair in row["pairs"])
    for label in _pair_labels(next(iter(rows.values()))["pairs"], letters):
        table.add_column(f"cos {label}", justify="right")
        table.add_column(f"conflict {label}", justify="right")
        if overlapping:
            table.add_column(f"overlap {label}", justify="right")
    for label, row in [*rows.items(), *total.items()]:
        cells = [label, f"{row['parameters']:,}"]
        if based:
            for name in names:
                cells.append(_number(row["models"][name]["delta to base"], ".4f"))
                if spectral:
                    cells.append(_rank(row["models"][name]))
        for pair in _pairs(row["pairs"]):
            cells += [_number(pair.get("cosine"), ".3f"), _number(pair.get("sign conflict"), ".3f")]
            if overlapping:
                cells.append(_overlap(pair))
        table.add_row(*cells, style="bold" if row is total.get("all") else None)
    return table


def _pair_labels(pairs: Sequence[Mapping[str, Any]], letters: Mapping[str, str]) -> list[str]:
    if len(pairs) > _PAIRS:
        return ["mean of pairs"]
    return ["".join(letters[name] for name in pair["models"]) for pair in pairs]


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The pairs themselves, or, where they would not fit on a page, their mean."""
    if len(pairs) <= _PAIRS:
        return list(pairs)
    mean: dict[str, Any] = {}
    for key in ("cosine", "sign conflict", "overlap of outputs", "overlap error"):
        known = [pair[key] for pair in pairs if pair.get(key) is not None]
        if known:
            mean[key] = sum(known) / len(known)
    return [mean]


def _rank(model: Mapping[str, Any]) -> str:
    if "rank" not in model:
        return "–"
    return "full" if model["rank"] is None else f"{model['rank']:g}"


def _overlap(pair: Mapping[str, Any]) -> str:
    if "overlap of outputs" not in pair:
        return "–"
    chance = f" [{pair['overlap by chance'][0]:.3f}]" if "overlap by chance" in pair else ""
    return f"{pair['overlap of outputs']:.3f} ± {pair['overlap error']:.2f}{escape(chance)}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
