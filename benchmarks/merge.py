"""Speed and memory of `model-fusion merge` beside mergekit and beside the disk, whole processes.

    python benchmarks/merge.py [--quick] [--size 500M] [--mergekit PYTHON] [--methods ties,della] [--json FILE]

Makes one base and two fine-tunes, then runs both tools alternately, `--rounds` times, on the same recipe.
Reported are medians of CPU seconds and wall time, and the peak of private memory (from a round of its own,
since sampling it disturbs). `--mergekit` is a Python that has mergekit; without it only ours is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from made_models import SIZES, Shape, make
from measure import Cost, machine, run

# method → (base needed, parameters of each model, of the recipe, mergekit ÷ ours that is asked for: CPU, wall)
METHODS: dict[str, tuple[bool, dict[str, Any], dict[str, Any], tuple[float, float]]] = {
    "linear": (False, {"weight": 0.5}, {}, (1, 2)),
    "task_arithmetic": (True, {"weight": 0.5}, {}, (1, 2)),
    "slerp": (True, {}, {"t": 0.4}, (3, 3)),
    "karcher": (False, {}, {}, (3, 3)),
    "ties": (True, {"weight": 0.5, "density": 0.5}, {}, (6, 6)),
    "breadcrumbs": (True, {"weight": 0.5, "density": 0.5, "gamma": 0.01}, {}, (6, 6)),
    "dare_ties": (True, {"weight": 0.5, "density": 0.5}, {}, (4, 4)),
    "della": (True, {"weight": 0.5, "density": 0.5, "epsilon": 0.15}, {}, (8, 8)),
    "sce": (True, {}, {"select_topk": 0.5}, (15, 15)),
}
SEEDS = {"base": 1, "one": 2, "two": 3}


def recipe(method: str, folder: Path) -> dict[str, Any]:
    based, each, whole, _ = METHODS[method]
    names = ["one"] if method == "slerp" else ["one", "two"]
    models: list[dict[str, Any]] = [{"model": str(folder / n), **({"parameters": each} if each else {})} for n in names]
    if method == "slerp":
        models.append({"model": str(folder / "base")})
    text: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if based:
        text["base_model"] = str(folder / "base")
    return text | ({"parameters": whole} if whole else {})


def environment() -> dict[str, str]:
    """Both tools choose their own number of threads, and ours runs from this source tree."""
    source = str(Path(__file__).resolve().parent.parent / "src")
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return kept | {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}


def commands(python: str | None) -> dict[str, list[str]]:
    """Tool → the command before RECIPE and OUTPUT."""
    found = {"ours": [sys.executable, "-c", "from model_fusion.cli.main import main; main()", "merge"]}
    if python is not None:
        found["mergekit"] = [str(Path(python).parent / "mergekit-yaml"), "--quiet"]
    return found


def once(tool: str, command: list[str], path: Path, out: Path, memory: bool = False) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    tail = [str(path), str(out)] if tool == "mergekit" else [str(path), "-o", str(out)]
    return run([*command, *tail], environment(), memory=memory)


def floor(folder: Path, names: list[str], size: int) -> dict[str, float]:
    """Wall seconds of reading the inputs, writing the output durably, and starting torch."""
    files = [str(p) for n in names for p in (folder / n).glob("*.safetensors")]
    out = folder / "floor"
    parts = {
        "cat": run(["sh", "-c", 'cat "$@" > /dev/null', "cat", *files]),
        "dd": run(["dd", "if=/dev/zero", f"of={out}", "bs=4M", f"count={-(-size // (4 << 20))}", "conv=fsync"]),
        "torch": run([sys.executable, "-c", "import torch"], environment()),
    }
    out.unlink()
    return {name: cost.wall for name, cost in parts.items()}


def bound(shape: Shape, models: int) -> int:
    """Private memory allowed: 400 MB + threads × (models + 2) × the largest tensor in float32."""
    largest = max(4 * _product(dims) for _, dims in shape.tensors())
    return 400 * 10**6 + (os.cpu_count() or 1) * (models + 2) * largest


def _product(dims: tuple[int, ...]) -> int:
    out = 1
    for n in dims:
        out *= n
    return out


def bench(method: str, shape: Shape, folder: Path, python: str | None, rounds: int, sampled: bool) -> dict[str, Any]:
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump(recipe(method, folder)))
    based = METHODS[method][0]
    inputs = ["base", "one"] if method == "slerp" else ["one", "two", *(["base"] if based else [])]
    tools = commands(python)
    costs: dict[str, list[Cost]] = {tool: [] for tool in tools}
    floors: list[dict[str, float]] = []
    for _ in range(rounds):
        for tool, command in tools.items():
            costs[tool].append(once(tool, command, path, folder / "out"))
        shutil.rmtree(folder / "out")
        floors.append(floor(folder, inputs, 2 * shape.numel()))
    row: dict[str, Any] = {"method": method}
    for tool, command in tools.items():
        row[tool] = {
            "cpu": statistics.median(c.cpu for c in costs[tool]),
            "wall": statistics.median(c.wall for c in costs[tool]),
            "private": None,
        }
        if tool == "ours" or sampled:
            row[tool]["private"] = once(tool, command, path, folder / "out", memory=True).private
    shutil.rmtree(folder / "out")
    row["floor"] = {k: statistics.median(f[k] for f in floors) for k in floors[0]}
    row["times_floor"] = row["ours"]["wall"] / sum(row["floor"].values())
    row["private_bound"] = bound(shape, len(inputs))
    if python is not None:
        row["ratio"] = {k: row["mergekit"][k] / row["ours"][k] for k in ("cpu", "wall")}
        row["asked"] = dict(zip(("cpu", "wall"), METHODS[method][3], strict=True))
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | ours CPU s | wall s | private MB (bound) | mergekit CPU s | wall s | private MB | CPU × (asked) |"
    ]
    lines[0] += " wall × (asked) | wall ÷ floor |"
    lines.append("|---" * 10 + "|")
    for row in rows:
        own, other, ratio = row["ours"], row.get("mergekit"), row.get("ratio")
        cells = [row["method"], f"{own['cpu']:.2f}", f"{own['wall']:.2f}"]
        cells.append(f"{own['private'] / 1e6:.0f} ({row['private_bound'] / 1e6:.0f})")
        if other is None or ratio is None:
            cells += ["not run"] * 3 + ["–"] * 2
        else:
            private = "not sampled" if other["private"] is None else f"{other['private'] / 1e6:.0f}"
            cells += [f"{other['cpu']:.2f}", f"{other['wall']:.2f}", private]
            cells += [f"{ratio[k]:.2f} ({row['asked'][k]:g})" for k in ("cpu", "wall")]
        cells.append(f"{row['times_floor']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="500M")
    parser.add_argument("--quick", action="store_true", help="50M parameters, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--mergekit", metavar="PYTHON", help="a Python that has mergekit")
    parser.add_argument("--mergekit-memory", action="store_true", help="one more run of mergekit, for its memory")
    parser.add_argument("--folder", type=Path, help="where to make the models (default: a temporary folder)")
    parser.add_argument("--models", type=Path, help="keep the models here, and use them again where they exist")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    size = "50M" if options.quick else options.size
    rounds = 1 if options.quick else options.rounds
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"unknown methods {sorted(unknown)}; known: {', '.join(METHODS)}")
    shape = SIZES[size]
    facts = {"size": size, "parameters": shape.numel(), "rounds": rounds, "seeds": SEEDS, **machine()}
    facts["mergekit"] = version_of(options.mergekit)
    print(json.dumps(facts, indent=1), flush=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = options.models or Path(temporary)
        for name, seed in SEEDS.items():
            if not (folder / name).exists():
                make(folder / name, shape, seed, None if name == "base" else SEEDS["base"])
        for method in methods:
            rows.append(bench(method, shape, folder, options.mergekit, rounds, options.mergekit_memory))
            print(f"{method}: {json.dumps(rows[-1])}", file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


def version_of(python: str | None) -> str:
    if python is None:
        return "not run: no --mergekit given"
    code = "from importlib.metadata import version; print(version('mergekit'), 'on torch', version('torch'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
