"""Composition on digits: does the LLM speak of the right digit in questions that no training ever asked?

    python benchmarks/align.py [--seeds 5] [--pictures 60] [--tokens 1] [--codes 16] [--bridge prefix] [--steps N]
                               [--start words|random] [--quick] [--journal FILE] [--json FILE]

The bridge is aligned on unlabelled pictures and generic prompts. The question types (benchmarks/align_questions.json)
were committed before the first training run. A type counts where the text oracle, told the expert's word, beats the
best constant answer by 20 points on held-out pictures. `same`: greedy texts equal to the oracle's. Beside it, `own
embeddings`: the embeddings of the word itself at the placeholder, with no training. With `--journal`, an
interrupted run goes on where it stopped. CPU seconds are of one alignment (oracle, start, training, validation).
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from measure import machine
from model_fusion.evaluate.composition import QuestionType, parity, question_types, scored
from model_fusion.evaluate.journal import Journal
from model_fusion.evaluate.statistics import interval
from model_fusion.evaluate.tasks.base import Task
from model_fusion.evaluate.tasks.digits import NAMES, digits_task, true_names
from model_fusion.fuse.align import read, spell
from model_fusion.fuse.bridges import Lora, Prefix
from model_fusion.fuse.experts import Expert, Field, InputSchema
from model_fusion.fuse.model import FusedModel

QUESTIONS = Path(__file__).with_name("align_questions.json")
PLACEHOLDER = "<|picture|>"
NEW_TOKENS = 10


def one_hot(items: Any) -> Any:
    return np.eye(len(NAMES))[[int(i) for i in items]]


@functools.cache
def own_embeddings(fused: FusedModel) -> FusedModel:
    """The same LLM reading a class number as exactly the embeddings of the class's name."""
    expert = Expert.from_callable(one_hot, InputSchema((Field("class", "int", 0, 9),)), classes=NAMES)
    bridge = Prefix(tokens=1, codes=len(NAMES))
    out = FusedModel.build(fused.base, tokenizer=fused.tokenizer, experts={"picture": expert}, bridge=bridge)
    classes = list(range(len(NAMES)))
    out.normalisers["picture"].fit(expert.encode(classes))  # type: ignore[operator]
    if (error := spell(out, read(out, classes))) > 1e-3:
        raise RuntimeError(f"the baseline does not read the names' own embeddings (error {error:.4f})")
    return out


class Cells:
    """Finished cells by key, in a journal where one is asked for."""

    def __init__(self, journal: Journal | None) -> None:
        self.journal, self.done = journal, journal.cells if journal else dict[str, Any]()

    def get(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell called `key`, made now if it is not there."""
        if key not in self.done:
            found = make()
            if self.journal:
                self.journal.add(key, found)
            else:
                self.done[key] = found
        return self.done[key]


def heard(fused: FusedModel, one: QuestionType) -> dict[str, Any]:
    """What the text oracle says when told each class's name."""
    with fused.bridge_off():
        return {"texts": fused.answer([one.prompt(n) for n in NAMES], max_new_tokens=NEW_TOKENS)}


def said(fused: FusedModel, one: QuestionType, inputs: Sequence[Any]) -> list[str]:
    """What the fused model says of each input."""
    given = [{"picture": item} for item in inputs]
    return fused.answer([one.prompt(PLACEHOLDER)] * len(given), given, max_new_tokens=NEW_TOKENS)


def seed_cell(cells: Cells, fused: FusedModel, task: Task, seed: int, types: list[QuestionType], a: Any) -> None:
    """Align one bridge and score every type that counts, on pictures of this seed's own: five seeds of 60 see all."""
    shown = [task.test[(seed * a.pictures + i) % len(task.test)] for i in range(a.pictures)]
    pictures = [e.inputs["picture"] for e in shown]
    named = [NAMES.index(e.answer) for e in shown]
    truth = [NAMES.index(name) for name in true_names(pictures)]
    model = fused.with_experts({"picture": task.expert})
    model.add_bridge("aligned", (Prefix if a.bridge == "prefix" else Lora)(tokens=a.tokens, codes=a.codes), seed=seed)
    cpu = time.process_time()
    history = model.align(
        [e.inputs["picture"] for e in task.train],
        validation=[e.inputs["picture"] for e in task.validation],
        start_at_words=a.start == "words",
        seed=seed,
        progress=False,
        **({} if a.steps is None else {"steps": a.steps}),
    )
    cpu = time.process_time() - cpu
    rows, own, dropped = {}, {}, []
    for one in types:
        oracle = cells.get(f"oracle/{one.name}", lambda one=one: heard(fused, one))["texts"]
        told, right = [oracle[i] for i in named], [one.answers[i] for i in truth]
        if not scored(told, told, right).counts:
            dropped.append(one.name)
            continue
        texts = cells.get(f"{seed}/{one.name}", lambda one=one: {"texts": said(model, one, pictures)})["texts"]
        plain = cells.get(f"own/{one.name}", lambda one=one: {"texts": said(own_embeddings(fused), one, range(10))})
        rows[one.name] = scored(texts, told, right)
        own[one.name] = scored([plain["texts"][i] for i in named], told, right)
    fused.set_bridge("default")
    fused.remove_bridge("aligned")
    found = {
        "types": {name: asdict(row) for name, row in rows.items()},
        "own": {name: asdict(row) for name, row in own.items()},
        "dropped": dropped,
        "cpu": cpu,
        "validations": history.validations,
        "best_step": history.best_step,
        "parity": parity(rows),
        "own_parity": parity(own),
    }
    cells.get(f"{seed}/done", lambda: found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--bridge", choices=("prefix", "lora"), default="prefix")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--codes", type=int, default=16)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--start", choices=("words", "random"), default="words")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--quick", action="store_true", help="one seed, 20 pictures")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.quick:
        a.seeds, a.pictures = 1, min(a.pictures, 20)
    setting = {k: getattr(a, k) for k in ("pictures", "bridge", "tokens", "codes", "steps", "start", "base")}
    cells = Cells(Journal(a.journal, json.dumps(setting), resume=True) if a.journal else None)
    types = question_types(QUESTIONS)
    fused: FusedModel | None = None
    for seed in range(a.seeds):
        if f"{seed}/done" in cells.done:
            continue
        task = digits_task(seed=seed, labels=400)
        if fused is None:
            fused = FusedModel.build(a.base, experts={"picture": task.expert}, bridge="tool")
        seed_cell(cells, fused, task, seed, types, a)
    report(cells.done, a.seeds, setting, a.json)


def report(cells: dict[str, Any], seeds: int, setting: dict[str, Any], file: Path | None) -> None:
    """Print the table and write the JSON."""
    runs = [cells[f"{seed}/done"] for seed in range(seeds)]
    names = [name for name in runs[0]["own"] if all(name in run["types"] for run in runs)]
    table = Table("type", "constant", "oracle", "fused", "same as oracle", "worst seed", "own embeddings: same")
    for name in names:
        columns = [[run["types"][name][key] for run in runs] for key in ("constant", "oracle", "fused", "same")]
        same = interval(columns[3])
        spread = "" if same.low is None else f" [{same.low:.3f}, {same.high:.3f}]"
        own = sum(run["own"][name]["same"] for run in runs) / seeds
        means = [f"{sum(c) / seeds:.3f}" for c in columns]
        table.add_row(name, *means[:3], means[3] + spread, f"{min(columns[3]):.3f}", f"{own:.3f}")
    console = Console(width=140)
    console.print(table)
    whole = interval([run["parity"] for run in runs])
    own = sum(run["own_parity"] for run in runs) / seeds
    console.print(f"parity fused / oracle: {whole.mean:.3f} {whole.to_json()}; own embeddings {own:.3f}")
    console.print(f"CPU seconds of one alignment: {[round(run['cpu'], 1) for run in runs]}")
    dropped = sorted({name for run in runs for name in run["dropped"]})
    console.print(f"do not count (oracle less than 20 points above a constant): {', '.join(dropped)}")
    about = machine() | {"torch": torch.__version__, "seeds": list(range(seeds)), "threads": torch.get_num_threads()}
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    if file:
        file.write_text(json.dumps({"machine": about, "setting": setting, "cells": cells}, indent=1))


if __name__ == "__main__":
    main()
