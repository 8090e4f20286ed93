"""An audit in the terminal: one row a control, with intervals and the paired difference to the fusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from model_fusion.report.claims import Claim


def print_audit(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table, what was skipped, and the claims."""
    console = console or Console()
    if not console.is_terminal:  # a file or a pipe has no width: rich would take 80 columns
        console = Console(file=console.file, width=170)
    console.print(audit_table(report))
    for skipped in report["skipped"]:
        console.print(f"{skipped['control']:>5}  {skipped['name']}: not applicable, {skipped['why']}", style="dim")
    for claim in (Claim(**entry) for entry in report["claims"]):
        mark = {True: "[green]supported[/green]", False: "[red]not supported[/red]", None: "[yellow]open[/yellow]"}
        console.print(f"{mark[claim.supported]}: {claim.claim}")
        console.print(f"    {claim.because}", style="dim", highlight=False)
    cost = report["cost"]
    console.print(f"{seeds(report)}; {cost['cpu_seconds']:.0f} s of CPU, {cost['seconds']:.0f} s in all", style="dim")


def audit_table(report: Mapping[str, Any]) -> Table:
    """The rows as a rich table."""
    metric = report["task"]["metric"]
    title = f"Audit of a {report['fusion']['bridge']['kind']} fusion on {report['task']['name']}: {seeds(report)}"
    table = Table("", "control", "labels", "agreement", metric["label"], f"fusion − control, {metric['label']}",
                  "n", title=title)  # fmt: skip
    for row in report["rows"]:
        table.add_row(*cells(row, metric, report["task"]["labels"]))
    return table


def cells(row: Mapping[str, Any], metric: Mapping[str, Any], labels: int) -> list[str]:
    """A row as texts: key, name, labels, agreement, metric, difference, number of seeds."""
    scores, name, digits = row["scores"], metric["name"], metric["digits"]
    difference = row.get("difference", {}).get(name)
    own = row["control"] == "12"  # its metric would judge another expert by this one's truth
    return [
        row["control"],
        row["name"] + (f": {row['variant']}" if row["variant"] else ""),
        "" if not row["seeded"] else str(row["labels"] or labels),
        shown(scores["agreement"], 3) if "agreement" in scores else "",
        shown(scores[name], digits) if name in scores and not own else "",
        shown(difference, digits, signed=True) if difference and not own else "",
        str(scores["agreement"]["n"]) if row["seeded"] else "",
    ]


def shown(interval: Mapping[str, Any], digits: int, *, signed: bool = False) -> str:
    """ "0.994 [0.990, 0.998]", or the bare mean where there is no interval."""
    plus = "+" if signed else ""
    mean = f"{interval['mean']:{plus}.{digits}f}"
    if interval["low"] is None:
        return mean
    return f"{mean} [{interval['low']:{plus}.{digits}f}, {interval['high']:{plus}.{digits}f}]"


def seeds(report: Mapping[str, Any]) -> str:
    """How much evidence this is, in words."""
    count = report["seeds"]["count"]
    text = f"{count} seed{'s' if count > 1 else ''}"
    if report["seeds"]["quick"]:
        return f"QUICK LOOK, {text}: not an audit"
    return text if report["seeds"]["enough"] else f"{text}: too few for an audit (5)"
