"""An audit as one self-contained HTML page: claims in words, plots, the table, samples, machine and versions."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping
from typing import Any

from model_fusion.report.claims import Claim
from model_fusion.report.plots import controls_plot, curve_plot, exchange_plot, gate_plot, svg
from model_fusion.report.table import cells, seeds

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:13px}td,th{border-bottom:1px solid #ddd;padding:.25rem .6rem;text-align:left;
vertical-align:top}svg{max-width:100%;height:auto}.yes{border-left:4px solid #2f855a}.no{border-left:4px solid #c53030}
.open{border-left:4px solid #b7791f}li{list-style:none;padding:.2rem .8rem;margin:.4rem 0}ul{padding:0}
small,.because{color:#555}.warn{background:#fefcbf;padding:.6rem 1rem}
"""
Draw = Callable[[Any], None]


def page(report: Mapping[str, Any], judged: list[Claim], draw: Draw | None = None) -> str:
    """The page. `draw(figure)` is the task's own picture of the fusion's answers."""
    task, fusion = report["task"], report["fusion"]
    title = f"Audit: {fusion['bridge']['kind']} fusion on {task['name']}"
    parts = [
        f"<h1>{esc(title)}</h1>",
        f"<p>Base LLM {esc(fusion['base'])}; the bridge reads the expert's {esc(fusion['reads'])}; "
        f"{task['labels']} labels; {task['questions']} questions, {task['test']} of them test rows. "
        f"{esc(seeds(report))}. Seeds vary {esc(report['seeds']['vary'])}.</p>",
    ]
    if not report["seeds"]["enough"]:
        parts.append(f'<p class="warn">{esc(seeds(report))}. Intervals are missing or too wide to conclude from.</p>')
    parts += _claims(judged)
    parts += ["<h2>Every control</h2>", controls_plot(report), _table(report)]
    for heading, plot in (
        ("Another expert put in, nothing retrained", exchange_plot(report)),
        ("Few labels", curve_plot(report)),
        ("The answers, pictured", svg(draw, 9, 7.5) if draw else ""),
    ):
        if plot:
            parts += [f"<h2>{heading}</h2>", plot]
    parts += _speech(report["speech"])
    parts += ["<h2>Where this was measured</h2>", f"<pre>{esc(json.dumps(_origin(report), indent=2))}</pre>"]
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{esc(title)}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def esc(value: Any) -> str:
    """Text for HTML."""
    return html.escape(str(value))


def _claims(judged: list[Claim]) -> list[str]:
    out = []
    for supported, heading, css in (
        (True, "What the evidence supports", "yes"),
        (False, "What the evidence does not support", "no"),
        (None, "What this audit leaves open", "open"),
    ):
        found = [claim for claim in judged if claim.supported is supported]
        if found:
            lines = "".join(
                f'<li class="{css}">{esc(c.claim)}<br><span class="because">{esc(c.because)}</span></li>' for c in found
            )
            out += [f"<h2>{heading}</h2>", f"<ul>{lines}</ul>"]
    return out


def _table(report: Mapping[str, Any]) -> str:
    metric = report["task"]["metric"]
    head = ["", "control", "labels", "agreement", metric["label"], f"fusion − control, {metric['label']}", "n",
            "rules out"]  # fmt: skip
    rows = [[*cells(row, metric, report["task"]["labels"]), row["rules_out"]] for row in report["rows"]]
    skipped = [[s["control"], s["name"], "", "", "", "", "", f"not applicable: {s['why']}"] for s in report["skipped"]]
    return _rows(head, rows + skipped)


def _speech(speech: Mapping[str, Any]) -> list[str]:
    samples = [[s["prompt"], s["fused"], s["oracle"]] for s in speech["samples"]]
    out = [
        "<h2>Language</h2>",
        f"<p>Mean KL to the text oracle, expert present, {speech['prompts']} unrelated prompts: "
        f"{speech['kl_mean']:.4f} nats a token. Perplexity of {speech['perplexity']['bytes']} bytes of prose: "
        f"{speech['perplexity']['bridge_on']:.3f}, with the bridge off {speech['perplexity']['bridge_off']:.3f}.</p>",
        "<p>Next turns: the task's question was asked and answered, then:</p>",
        _rows(["question", "the fused model", "the text oracle"], samples),
    ]
    for name, tokens in speech["gates"].items():
        plot = gate_plot(tokens)
        if plot:
            out += [f"<h3>The gate, token by token: a question {esc(name)}</h3>", plot]
    return out


def _rows(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{esc(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _origin(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("fusion", "seeds", "training", "machine", "versions", "cost")}
