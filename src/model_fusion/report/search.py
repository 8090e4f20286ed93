"""What a search says when it is done. Takes its report, imports no room."""

from collections.abc import Mapping
from typing import Any


def found(report: Mapping[str, Any]) -> str:
    """Scores on validation and test, the winner's values, and the sentence."""
    metric, test, winner = report["settings"]["metric"], report["test"], report["winner"]
    failed = sum(trial["score"] is None for trial in report["trials"])
    lines = [f"{'':<18}{'validation':>14}{'test':>14}   {metric}, {report['settings']['direction']}"]
    lines.append(_row(winner["kind"].replace("_", " ") + " (winner)", winner["score"], test["winner"]))
    plain = report["task_arithmetic"]["best"]
    if plain is not None:
        lines.append(_row(f"plain TA, {plain['lambda']:g}", plain["score"], test["task_arithmetic"]))
    lines += [f"  {name} = {value:.5g}" if isinstance(value, float) else f"  {name} = {value}"
              for name, value in winner["values"].items()]  # fmt: skip
    lines.append(f"{len(report['trials'])} trials" + (f", {failed} without a score" if failed else ""))
    return "\n".join([*lines, report["sentence"]])


def _row(name: str, validation: float, test: float) -> str:
    return f"{name:<18}{validation:>14.5g}{test:>14.5g}"
