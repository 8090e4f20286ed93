"""Two values in one prompt, which no training ever showed: does the LLM keep two pictures apart?

    python benchmarks/align_pairs.py [--seeds 3] [--pairs 40] [--journal FILE] [--json FILE]

The bridge is aligned as in benchmarks/align.py: on single unlabelled pictures of digits and generic prompts, each with
one placeholder. Asked are few-shot questions about two held-out pictures, one placeholder each. The types below were
committed before the first run. A type counts where the text oracle (the plain LLM told both names in words) beats the
best constant answer by 20 points. `same`: greedy texts equal to the oracle's; `crossed`: the share that equals the
oracle's text for the two pictures in the other order, among pairs where the two texts differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from align import NEW_TOKENS, Cells
from measure import machine
from model_fusion.evaluate.composition import Scored, parity, scored
from model_fusion.evaluate.journal import Journal
from model_fusion.evaluate.statistics import interval
from model_fusion.evaluate.tasks.base import Task
from model_fusion.evaluate.tasks.digits import NAMES, digits_task, true_names
from model_fusion.fuse.bridges import Prefix
from model_fusion.fuse.model import FusedModel

Pair = tuple[str, str]
SUMS = (*NAMES, "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")
SHOWN: tuple[Pair, ...] = (("two", "five"), ("eight", "one"), ("six", "three"), ("four", "nine"), ("seven", "zero"))
TYPES: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "first": ("Write the first digit.", lambda a, b: a),
    "second": ("Write the second digit.", lambda a, b: b),
    "both": ("Write both digits.", lambda a, b: f"{a} {b}"),
    "turned": ("Write the second digit, then the first.", lambda a, b: f"{b} {a}"),
    "list": ("Write them as a list in square brackets.", lambda a, b: f"[{a}, {b}]"),
    "larger": ("Which digit is larger?", lambda a, b: max(a, b, key=NAMES.index)),
    "sum": ("Add the digits.", lambda a, b: SUMS[NAMES.index(a) + NAMES.index(b)]),
}


def prompt(question: str, answer: Callable[[str, str], str], said: Pair) -> list[dict[str, str]]:
    """Five answered turns, then the one to be answered, with `said` (words or placeholders) as the digits."""

    def asked(pair: Pair) -> dict[str, str]:
        return {"role": "user", "content": f"First digit: {pair[0]}\nSecond digit: {pair[1]}\n{question}"}

    turns = []
    for pair in SHOWN:
        turns += [asked(pair), {"role": "assistant", "content": answer(*pair)}]
    return [*turns, asked(said)]


def aligned(fused: FusedModel, task: Task, seed: int) -> FusedModel:
    model = fused.with_experts({"picture": task.expert})
    model.add_bridge("aligned", Prefix(tokens=1, codes=16), seed=seed)
    model.align(
        [e.inputs["picture"] for e in task.train],
        validation=[e.inputs["picture"] for e in task.validation],
        seed=seed,
        progress=False,
    )
    return model


def seed_cell(cells: Cells, fused: FusedModel, task: Task, seed: int, count: int) -> dict[str, Any]:
    """Every type over `count` pairs of held-out pictures of different digits, as the expert reads them."""
    pictures, rng = [e.inputs["picture"] for e in task.test], np.random.default_rng(seed)
    read, truth = [e.answer for e in task.test], true_names(pictures)
    picks: list[tuple[int, int]] = []
    while len(picks) < count:
        a, b = (int(i) for i in rng.integers(0, len(pictures), 2))
        if read[a] != read[b]:
            picks.append((a, b))
    model, found = aligned(fused, task, seed), {}
    inputs = [{"picture": [pictures[a], pictures[b]]} for a, b in picks]
    for name, (question, answer) in TYPES.items():

        def oracle(pairs: list[Pair], question: str = question, answer: Any = answer) -> list[str]:
            with model.bridge_off():
                return model.answer([prompt(question, answer, pair) for pair in pairs], max_new_tokens=NEW_TOKENS)

        def measured(name: str = name, question: str = question, answer: Any = answer, ask: Any = oracle) -> Any:
            marks = prompt(question, answer, ("<|picture|>", "<|picture|>"))
            told, other = ask([(read[a], read[b]) for a, b in picks]), ask([(read[b], read[a]) for a, b in picks])
            texts = model.answer([marks] * len(picks), inputs, max_new_tokens=NEW_TOKENS)
            row = scored(texts, told, [answer(truth[a], truth[b]) for a, b in picks])
            differ = [(text, o) for text, t, o in zip(texts, told, other, strict=True) if t != o]
            crossed = sum(text == o for text, o in differ) / len(differ) if differ else 0.0
            return {**asdict(row), "counts": row.counts, "crossed": crossed}

        found[name] = cells.get(f"{seed}/{name}", measured)
    fused.set_bridge("default")
    fused.remove_bridge("aligned")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    setting = {"pairs": a.pairs, "base": a.base}
    cells, runs = Cells(Journal(a.journal, json.dumps(setting), resume=True) if a.journal else None), []
    fused: FusedModel | None = None
    for seed in range(a.seeds):
        kept = {name: cells.done.get(f"{seed}/{name}") for name in TYPES}
        if not all(kept.values()):
            task = digits_task(seed=seed, labels=400)
            fused = fused or FusedModel.build(a.base, experts={"picture": task.expert}, bridge="tool")
            kept = seed_cell(cells, fused, task, seed, a.pairs)
        runs.append(kept)
    table = Table("type", "constant", "oracle", "fused", "same as oracle", "worst seed", "crossed", "counts")
    for name in TYPES:
        rows = [run[name] for run in runs]
        same = interval([row["same"] for row in rows])
        spread = "" if same.low is None else f" [{same.low:.3f}, {same.high:.3f}]"
        means = [
            f"{sum(row[key] for row in rows) / len(rows):.3f}" for key in ("constant", "oracle", "fused", "crossed")
        ]
        counted = f"{sum(row['counts'] for row in rows)} of {len(rows)}"
        worst = f"{min(row['same'] for row in rows):.3f}"
        table.add_row(name, *means[:3], f"{same.mean:.3f}{spread}", worst, means[3], counted)
    console = Console(width=140)
    console.print(table)
    fields = ("fused", "oracle", "constant", "same")
    whole = interval([parity({n: Scored(**{f: r[f] for f in fields}) for n, r in run.items()}) for run in runs])
    console.print(f"parity fused / oracle over the types that count: {whole.mean:.3f} {whole.to_json()}")
    about = machine() | {"torch": torch.__version__, "seeds": list(range(a.seeds)), "threads": torch.get_num_threads()}
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    if a.json:
        a.json.write_text(json.dumps({"machine": about, "setting": setting, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
