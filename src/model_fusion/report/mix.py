"""The verdict on a mixture: tables in the terminal, or one self-contained page with heatmaps. Knows no model."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ddd;padding:.3rem .7rem;text-align:right}"
    "th{font-weight:600}.verdict{border-left:4px solid #1b6ca8;padding:.6rem 1rem;background:#f4f8fb}"
)
_WHOLE = ("oracle", "routed", "gateless", "soup")


def show(verdict: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the tables and the sentence."""
    console = console or Console()
    names = verdict["experts"]
    matrix = Table(title="Forced through one expert, bits per byte", title_justify="left")
    for head in ("expert \\ domain", *names):
        matrix.add_column(head)
    for name, row in zip(names, verdict["matrix"], strict=True):
        matrix.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(matrix)
    whole = Table(title="Mean over domains", title_justify="left")
    for head in ("", "bits per byte", "nats per token"):
        whole.add_column(head)
    for key in _WHOLE:
        whole.add_row(key, f"{verdict[key]:.3f}", f"{verdict['nats'][key]:.3f}")
    whole.add_row("headroom", f"{verdict['headroom']:.3f}", "")
    console.print(whole)
    layers = Table(title="Routing", title_justify="left")
    for head in ("layer", "accuracy", "input mismatch"):
        layers.add_column(head)
    for layer, accuracy, mismatch in zip(verdict["layers"], verdict["accuracy"], verdict["mismatch"], strict=True):
        layers.add_row(str(layer), f"{accuracy:.3f}", f"{mismatch:.3f}")
    console.print(layers)
    load = ", ".join(f"{name} {share:.2f}" for name, share in zip(names, verdict["load"], strict=True))
    console.print(f"Expert load: {load}")
    console.print(verdict["sentence"], soft_wrap=True)


def page(verdict: Mapping[str, Any]) -> str:
    """The same as HTML; heatmaps are coloured table cells, so the page needs nothing else."""
    names = verdict["experts"]
    body = [
        "<h1>Will a router pay?</h1>",
        f'<p class="verdict">{html.escape(verdict["sentence"])}</p>',
        "<h2>Forced through one expert</h2><p>Bits per byte on held-out text; rows are experts, columns domains. "
        "Darker is better.</p>",
        _heatmap(names, names, verdict["matrix"], darker="low"),
        "<h2>Mean over domains</h2>",
        _heatmap(
            [*_WHOLE],
            ["bits per byte", "nats per token"],
            [[verdict[key], verdict["nats"][key]] for key in _WHOLE],
            darker=None,
        ),
        f"<p>Headroom (gateless − oracle): {verdict['headroom']:.3f} bits per byte.</p>",
        "<h2>Routing accuracy of each layer</h2><p>Share of tokens whose first choice is their domain's expert; and "
        "how far the router's input is from the one it would see were the text's own expert used throughout.</p>",
        _heatmap(
            ["accuracy", "input mismatch"],
            [str(n) for n in verdict["layers"]],
            [verdict["accuracy"], verdict["mismatch"]],
            darker="high",
        ),
        "<h2>Expert load</h2>",
        _heatmap(["share of choices"], names, [verdict["load"]], darker="high"),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Will a router pay?</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _heatmap(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], darker: str | None) -> str:
    flat = [value for row in values for value in row]
    low, span = min(flat), (max(flat) - min(flat)) or 1.0
    top = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns))
    out = [f"<tr>{top}</tr>"]
    for name, row in zip(rows, values, strict=True):
        cells = []
        for value in row:
            share = (value - low) / span
            strength = 0.0 if darker is None else 0.7 * (1 - share if darker == "low" else share)
            cells.append(f'<td style="background:rgba(27,108,168,{strength:.2f})">{value:.3f}</td>')
        out.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    return f"<table>{''.join(out)}</table>"
