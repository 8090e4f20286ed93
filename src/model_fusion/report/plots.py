"""An audit's plots, each as inline SVG. Draws on matplotlib figures; knows no task."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Mapping
from typing import Any

from model_fusion.errors import MissingDependencyError

LANDMARKS = ("dotted", "dashed", "dashdot", "solid")
FUSION, CONTROL, UNTRAINED = "#1b6ca8", "#777777", "#c05621"


def need_matplotlib() -> None:
    """Raise MissingDependencyError where no page can be drawn: to be called before long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("an HTML page needs matplotlib: pip install 'model-fusion[report]'")


def svg(draw: Callable[[Any], None], width: float, height: float) -> str:
    """What `draw(figure)` draws, as an <svg> element of `width` x `height` inches."""
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    out = io.StringIO()
    # A fixed salt and no date: the same numbers give the same page.
    with rc_context({"svg.hashsalt": "model-fusion", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def controls_plot(report: Mapping[str, Any]) -> str:
    """The task's metric of each control with its 95 % interval, and the landmarks."""
    metric = report["task"]["metric"]["name"]
    rows = [r for r in report["rows"] if r["labels"] is None and r["control"] != "12" and metric in r["scores"]]

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        for place, row in enumerate(reversed(rows)):
            score = row["scores"][metric]
            colour = FUSION if row["control"] in ("fused", "saved") else CONTROL
            error = None
            if score["low"] is not None:
                error = [[score["mean"] - score["low"]], [score["high"] - score["mean"]]]
            ax.errorbar([score["mean"]], [place], xerr=error, fmt="o", color=colour, capsize=3)
        ax.set_yticks(
            range(len(rows)),
            [f"{r['control']}  {r['name']}{r['variant'] and ': '}{r['variant']}" for r in reversed(rows)],
        )
        for (name, value), style in zip(report["task"]["landmarks"].items(), LANDMARKS, strict=False):
            ax.axvline(value, color="black", linewidth=0.8, linestyle=style, label=name)
        if report["task"]["landmarks"]:
            ax.legend(loc="lower left", fontsize=7)
        ax.set_xlabel(f"{report['task']['metric']['label']}, mean and 95 % interval over seeds")
        ax.grid(axis="x", alpha=0.3)

    return svg(draw, 9, 0.6 + 0.34 * len(rows))


def exchange_plot(report: Mapping[str, Any]) -> str:
    """Agreement with each expert that was put in. Empty where there was none."""
    rows = [row for row in report["rows"] if row["control"] == "12"]
    if not rows:
        return ""

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        means = [row["scores"]["agreement"]["mean"] for row in rows]
        ax.barh([row["variant"] for row in rows], means, color=FUSION)
        ax.axvline(0.95, color="black", linewidth=0.7, linestyle=":")
        ax.set(xlim=(0, 1), xlabel="agreement with the expert that was put in (dotted: 0.95)")

    return svg(draw, 9, 0.8 + 0.34 * len(rows))


def curve_plot(report: Mapping[str, Any]) -> str:
    """Few-label curve: the metric and the agreement against labels, trained against untrained expert."""
    metric = report["task"]["metric"]
    lines = {"fused": ("trained expert", FUSION), "5": ("untrained expert", UNTRAINED)}
    if not any(row["labels"] for row in report["rows"]):
        return ""

    def draw(figure: Any) -> None:
        names = list(dict.fromkeys(("agreement", metric["name"])))
        for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for key, (label, colour) in lines.items():
                rows = [r for r in report["rows"] if r["control"] == key]
                points = sorted((r["labels"] or report["task"]["labels"], r["scores"][name]) for r in rows)
                x, mean = [p[0] for p in points], [p[1]["mean"] for p in points]
                ax.plot(x, mean, "o-", color=colour, label=label)
                if all(p[1]["low"] is not None for p in points):
                    ax.fill_between(x, [p[1]["low"] for p in points], [p[1]["high"] for p in points], color=colour,
                                    alpha=0.15)  # fmt: skip
            ax.set(xscale="log", xlabel="labels, validation included", ylabel=name)
            ticks = sorted({r["labels"] or report["task"]["labels"] for r in report["rows"] if r["control"] in lines})
            ax.set_xticks(ticks, [str(tick) for tick in ticks])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            ax.legend()

    return svg(draw, 9, 3.2)


def gate_plot(tokens: list[Mapping[str, Any]]) -> str:
    """The gate's value at each token of one prompt and answer. Empty without gates."""
    if not tokens:
        return ""

    def draw(figure: Any) -> None:
        ax = figure.subplots()
        for layer in tokens[0]["gate"]:
            ax.plot([token["gate"][layer] for token in tokens], "o-", markersize=3, label=f"layer {layer}")
        labels = [printable(token["token"]) for token in tokens]
        ax.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=7)
        ax.axvspan(next((i for i, t in enumerate(tokens) if not t["prompt"]), len(tokens)) - 0.5, len(tokens) - 0.5,
                   color=FUSION, alpha=0.1, label="answer")  # fmt: skip
        ax.set(ylim=(0, 1), ylabel="gate g")
        ax.legend(fontsize=7)

    return svg(draw, 9, 3)


def printable(token: str) -> str:
    """A token in ASCII, white space made visible, and no dollar sign (matplotlib would read mathematics)."""
    shown = token.replace("\n", "\\n").replace(" ", "_").replace("$", "USD")
    return shown.encode("ascii", "replace").decode()
