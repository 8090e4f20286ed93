"""Every expert of a task through every bridge: does the LLM answer with the expert's skill, and what does it cost?

    python benchmarks/fuse.py [--task blackjack] [--experts grid,picture] [--bridges gated,prefix] [--seeds 5]
                              [--threads 1] [--journal FILE] [--json FILE]

Labels are the expert's own decisions. `agreement` is over the test inputs; the task's metric over all of them
(Blackjack: the exact expected return over all 280 states). Answers are greedy and parsed. Means over seeds with
95 % intervals; `lost` is the paired difference of the metric to the expert's own. CPU seconds and wall time are of
one fusion (normaliser, features, training, validation; loading the LLM excluded), on `--threads` threads.
With `--journal`, an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from measure import machine
from model_fusion.evaluate.journal import Journal
from model_fusion.evaluate.statistics import Interval, interval
from model_fusion.evaluate.tasks import task as make_task
from model_fusion.evaluate.tasks.base import Task
from model_fusion.fuse.bridges import REGISTRY
from model_fusion.fuse.model import FusedModel


class Bench:
    """One base LLM, loaded once; a fresh bridge, and the expert, for every cell."""

    def __init__(self, base: str, task: Task) -> None:
        self.fused = FusedModel.build(base, experts={task.expert_name: task.expert}, bridge="tool")

    def cell(self, task: Task, bridge: str, seed: int) -> dict[str, Any]:
        fused = copy.copy(self.fused)
        fused.experts = {task.expert_name: task.expert}
        fused.add_bridge("measured", bridge, seed=seed)
        try:
            return self._measure(fused, task, seed)
        finally:
            fused.set_bridge("default")
            fused.remove_bridge("measured")

    def _measure(self, fused: FusedModel, task: Task, seed: int) -> dict[str, Any]:
        cpu, wall, steps = time.process_time(), time.perf_counter(), 0
        if fused.bridge.trainable:
            steps = len(fused.fit(task.train, validation=task.validation, seed=seed).losses)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        asked, held = task.questions(), task.test
        texts = fused.answer([q.prompt for q in asked], [q.inputs for q in asked])
        unseen = fused.answer([e.prompt for e in held], [e.inputs for e in held])
        items = [q.inputs[task.expert_name] for q in asked]
        return {
            "metric": task.score_examples(asked, texts)[task.metric.name],
            "own": task.score(items, task.expert.describe(items))[task.metric.name],
            "agreement": task.score_examples(held, unseen)["agreement"],
            "cpu": cpu,
            "wall": wall,
            "steps": steps,
        }


def shown(found: Interval, digits: int) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:.{digits}f}"
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="blackjack")
    parser.add_argument("--experts", default="", help="comma-separated; the default is the task's own")
    parser.add_argument("--bridges", default="gated,prefix,lora,cross_attention,logit,tool")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    bridges, experts = a.bridges.split(","), a.experts.split(",") if a.experts else [""]
    for bridge in bridges:
        if bridge not in REGISTRY:
            parser.error(f"unknown bridge {bridge!r}: one of {', '.join(REGISTRY)}")
    console, bench, cells = Console(width=140), None, dict[str, dict[str, Any]]()
    journal = Journal(a.journal, f"{a.task} {a.base} {a.threads}", resume=True) if a.journal else None
    if journal:
        cells = journal.cells
    for expert in experts:
        for seed in range(a.seeds):
            wanted = [b for b in bridges if f"{expert}/{b}/{seed}" not in cells]
            if not wanted:
                continue
            cpu = time.process_time()
            task = make_task(a.task, seed=seed, **({"expert": expert} if expert else {}))
            cpu = time.process_time() - cpu
            bench = bench or Bench(a.base, task)
            for bridge in wanted:
                key, found = f"{expert}/{bridge}/{seed}", bench.cell(task, bridge, seed) | {"expert_cpu": cpu}
                cells[key] = found
                if journal:
                    journal.add(key, found)
    digits = make_task(a.task).metric.digits
    rows = []
    table = Table(*COLUMNS, title=f"{a.task}: {a.base}, {a.seeds} seeds, {a.threads} thread(s)")
    for expert in experts:
        for bridge in bridges:
            chosen = [cells[f"{expert}/{bridge}/{seed}"] for seed in range(a.seeds)]
            column = {key: interval([cell[key] for cell in chosen]) for key in ("agreement", "metric", "own", "cpu")}
            lost = interval([cell["metric"] - cell["own"] for cell in chosen])
            worst = min(cell["agreement"] for cell in chosen)
            rows.append({"expert": expert, "bridge": bridge, "cells": chosen, "lost": lost.to_json()})
            table.add_row(
                expert or "default",
                bridge,
                shown(column["agreement"], 3),
                f"{worst:.3f}",
                shown(column["metric"], digits),
                shown(column["own"], digits),
                shown(lost, digits),
                shown(column["cpu"], 1),
                f"{max(cell['expert_cpu'] for cell in chosen):.1f}",
            )
    console.print(table)
    about = machine() | {"transformers": transformers.__version__, "seeds": list(range(a.seeds)), "threads": a.threads}
    about["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    if a.json:
        a.json.write_text(json.dumps({"machine": about, "task": a.task, "rows": rows}, indent=1))


COLUMNS = ("expert", "bridge", "test agreement", "worst", "metric", "expert's own", "lost", "CPU s", "expert CPU s")

if __name__ == "__main__":
    main()
