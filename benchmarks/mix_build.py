"""Cost of building a mixture with random gates, beside mergekit-moe, whole processes, the same recipe file.

python benchmarks/mix_build.py --json out.json [--size 500M] [--mergekit PYTHON] [--rounds 3]

Makes one base and three fine-tunes (bfloat16). Medians of CPU seconds (user + system) and wall time; the peak of
private memory comes from a round of its own. PYTHON is an interpreter that has mergekit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from made_models import SIZES, make
from measure import machine, run
from model_fusion.mix.build import plan


def tokenizer(folder: Path, size: int) -> None:
    """A vocabulary of the model's size; mergekit-moe does not start without one."""
    vocabulary = {"[UNK]": 0, **{f"t{i}": i for i in range(1, size)}}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
             "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def recipe(root: Path) -> dict[str, Any]:
    experts = [{"source_model": str(root / f"expert{i}"), "positive_prompts": [f"t{i + 1}"]} for i in range(3)]
    return {"base_model": str(root / "base"), "gate_mode": "random", "dtype": "bfloat16", "experts": experts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--size", choices=[*SIZES], default="500M")
    parser.add_argument("--mergekit", type=Path, help="an interpreter that has mergekit")
    parser.add_argument("--models", type=Path, help="a folder that holds base, expert0, expert1, expert2 already")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    source = str(Path(__file__).resolve().parent.parent / "src")
    environment = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        root, shape = args.models or Path(temporary), SIZES[args.size]
        for i, name in enumerate(("base", "expert0", "expert1", "expert2") if args.models is None else ()):
            tokenizer(make(root / name, shape, 1 + i, 1 if i else None), shape.vocabulary)
        path, out = root / "recipe.yml", root / "out"
        path.write_text(yaml.safe_dump(recipe(root)))
        os.sync()  # a page that waits for the disk counts as its reader's private memory
        program = "from model_fusion.cli.main import main; main()"
        tools = {"ours": [sys.executable, "-c", program, "mix", "build", str(path), "-o", str(out)]}
        if args.mergekit:
            tools["mergekit"] = [str(args.mergekit.parent / "mergekit-moe"), str(path), str(out)]
        rows: dict[str, dict[str, float]] = {}
        costs: dict[str, list[Any]] = {tool: [] for tool in tools}
        for _ in range(args.rounds):
            for tool, command in tools.items():
                costs[tool].append(run(command, environment))
                shutil.rmtree(out)
        for tool, command in tools.items():
            rows[tool] = {
                "cpu": statistics.median(cost.cpu for cost in costs[tool]),
                "wall": statistics.median(cost.wall for cost in costs[tool]),
                "private_mb": run(command, environment, memory=True).private / 1e6,
            }
            shutil.rmtree(out)
        work = plan(path)
        layer = sum(o.spec.nbytes for o in work.outputs if o.spec.name.startswith("model.layers.0.block_sparse_moe"))
    bound = 400 + layer / 1e6
    report = {"machine": machine(), "size": args.size, "tools": rows, "private_bound_mb": bound}
    if args.mergekit:
        report["cpu_ratio"] = rows["mergekit"]["cpu"] / rows["ours"]["cpu"]
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
