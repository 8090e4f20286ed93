"""Merging methods on eight small tasks: every row's accuracy and bytes, over seeds, paired against task arithmetic.

    python benchmarks/eight_tasks.py [--seeds 0 1 2 3 4] [--methods base experts ties] [--json FILE]

Coefficients are chosen on validation and reported on test (`eight_tasks_data.py` has the tasks, `eight_tasks_rows.py`
the rows). Means have 95 % intervals over seeds; a difference is one only where its paired interval excludes 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from eight_tasks_data import Setting, make_setting
from eight_tasks_rows import ROWS
from measure import machine
from model_fusion.evaluate.statistics import Interval, interval, paired

MORE_ROWS: tuple[str, ...] = ("eight_tasks_databased", "eight_tasks_dynamic", "eight_tasks_masks")
"""Modules beside this file that register further rows."""
AGAINST = "task_arithmetic"


def main() -> None:
    for module in MORE_ROWS:
        importlib.import_module(module)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(ROWS), help=f"rows, of: {', '.join(ROWS)}")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    if unknown := [name for name in options.methods if name not in ROWS]:
        parser.error(f"unknown rows {unknown}; known: {', '.join(ROWS)}")
    facts = {"seeds": options.seeds, **machine()}
    print(json.dumps(facts, indent=1), flush=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.methods}
    for seed in options.seeds:
        start = time.process_time()
        setting = make_setting(seed)
        print(f"seed {seed}: experts trained in {time.process_time() - start:.1f} CPU s", flush=True)
        for name in options.methods:
            found[name].append({"seed": seed, **measure(name, setting)})
    rows = [summary(name, runs, found.get(AGAINST)) for name, runs in found.items()]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """One row on one seed."""
    start = time.process_time()
    result = ROWS[name].run(setting)
    return {
        "mean": fmean(result.test),
        "tasks": {task.name: value for task, value in zip(setting.tasks, result.test, strict=True)},
        "validation": result.validation,
        "chosen": result.chosen,
        "stored": result.stored,
        "notes": result.notes,
        "cpu_seconds": time.process_time() - start,
    }


def summary(name: str, runs: list[dict[str, Any]], against: list[dict[str, Any]] | None) -> dict[str, Any]:
    """One row over its seeds. `beyond`: paired difference to tuned task arithmetic, where that was run."""
    own = {run["seed"]: 100 * run["mean"] for run in runs}
    made = {"row": name, "kind": ROWS[name].kind, "accuracy": interval(list(own.values())).to_json()}
    other = None if against is None else {run["seed"]: 100 * run["mean"] for run in against}
    made["beyond"] = None if other is None else paired(own, other).to_json()
    made["stored"] = max(run["stored"] for run in runs)
    made["notes"] = {key: fmean(run["notes"][key] for run in runs) for key in runs[0]["notes"]}
    return {**made, "cpu_seconds": sum(run["cpu_seconds"] for run in runs), "runs": runs}


def shown(values: dict[str, Any]) -> str:
    """An interval as mean and half width."""
    one = Interval(**values)
    return f"{one.mean:.1f}" if one.high is None else f"{one.mean:.1f} ± {one.high - one.mean:.1f}"


def coefficients(chosen: dict[str, Any]) -> str:
    """As name=value."""
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in chosen.items()
    )


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| row | kind | test accuracy % | beyond {AGAINST} | kB stored | chosen | notes |", "|---" * 7 + "|"]
    for one in sorted(rows, key=lambda r: r["accuracy"]["mean"]):
        chosen = "; ".join(dict.fromkeys(coefficients(run["chosen"]) for run in one["runs"]))
        beyond = "–" if one["beyond"] is None or one["row"] == AGAINST else shown(one["beyond"])
        notes = ", ".join(f"{key} {value:.3g}" for key, value in one["notes"].items())
        kept = f"{one['stored'] / 1000:.0f}"
        lines.append(
            f"| {one['row']} | {one['kind']} | {shown(one['accuracy'])} | {beyond} | {kept} | {chosen} | {notes} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
