"""Four LoRA experts on SmolLM2-135M, merged by every method of ours: what is left of each expert's skill?

    python benchmarks/language_bench.py [--methods ties,tsv_m] [--characters 12000] [--journal FILE] [--json FILE]

The experts (benchmarks/language_data/adapters) were trained on dialogue, Python code, old English prose and arithmetic.
Perplexity on held-out text of each kind; `kept` is the share of an expert's own gain over the base, in nats a token,
that the merged model has on that expert's text. Each method's setting is chosen from its few candidates by the mean
`kept` on the validation texts; the table is of the test texts. Bytes are those of the weights on disk. With
`--journal`, finished rows are kept. Methods that take one or two models, or an aligned one, are left out, and named.
fisher and regmean read 2,048 tokens of each expert's validation text, the router of twin reads all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import model_fusion as mf
from language_bench_twin import measure as measure_twin
from language_texts import DOMAINS
from measure import machine
from model_fusion.checkpoint.llm import resolve_llm
from model_fusion.evaluate.journal import Journal
from model_fusion.evaluate.language import perplexity
from model_fusion.merge.calibration import language
from model_fusion.merge.methods import all_methods, get

DATA = Path(__file__).parent / "language_data"
SCALES = (0.25, 0.5, 0.75, 1.0)
Setting = dict[str, dict[str, Any]]
"""`method`: the method's parameters; `model`: each model's."""


def each(weights: tuple[float, ...] = SCALES, **model: Any) -> list[Setting]:
    return [{"method": {"normalize": False}, "model": {**model, "weight": w}} for w in weights]


def scaled(name: str, values: tuple[float, ...], **method: Any) -> list[Setting]:
    return [{"method": {**method, name: value}, "model": {}} for value in values]


PLAIN: list[Setting] = [{"method": {}, "model": {}}]
CANDIDATES: dict[str, list[Setting]] = {
    "linear": PLAIN,
    "task_arithmetic": each(),
    "karcher": PLAIN,
    "multislerp": PLAIN,
    "model_stock": PLAIN,
    "sce": scaled("select_topk", (0.1, 0.5, 1.0)),
    "ties": each((0.5, 1.0), density=0.2) + each((0.5, 1.0), density=0.5),
    "breadcrumbs": each(density=0.9),
    "breadcrumbs_ties": each((0.5, 1.0), density=0.9),
    "dare_linear": each((0.5, 1.0), density=0.5),
    "dare_ties": each((0.5, 1.0), density=0.5),
    "della": each((0.5, 1.0), density=0.5),
    "della_linear": each((0.5, 1.0), density=0.5),
    "ram": PLAIN,
    "ramplus_tl": PLAIN,
    "lines": scaled("beta", (0.25, 0.5, 0.75)),
    "consensus": [
        {"method": {"lambda": value}, "model": {"strength": strength}}
        for strength in (0.2, 0.4)
        for value in (0.7, 1.0)
    ],
    "tsv_m": scaled("lambda", (0.4, 0.55, 0.7)),
    "iso_c": scaled("lambda", (0.5, 1.0), force=True),
    "iso_cts": scaled("lambda", (0.5, 1.0), force=True),
    "wudi": scaled("time", (1.0, 10.0)),
    "fisher": PLAIN,
    "regmean": PLAIN,
}
ONE_OR_TWO = ("arcee_fusion", "nearswap", "nuslerp", "passthrough", "safemerge", "slerp")
"""Take one or two models, four experts would need a tree of merges; or, safemerge, repair one fine-tune."""


def texts(side: str, characters: int) -> dict[str, str]:
    return {name: (DATA / f"{name}.{side}.txt").read_text(encoding="utf-8")[:characters] for name in DOMAINS}


def nats(model: Any, tokenizer: Any, held: dict[str, str]) -> dict[str, float]:
    """Mean negative log-likelihood a token for each kind of text."""
    with torch.inference_mode():
        return {name: math.log(perplexity(model, tokenizer, text)) for name, text in held.items()}


def expert(name: str) -> str:
    return f"smollm2+{DATA / 'adapters' / name}"


def collected(name: str, kind: Any, folder: Path) -> str:
    """The file with the statistics of one expert's FFNs on its own validation text."""
    file = folder / f"{name}.{kind}.safetensors"
    if not file.is_file():
        texts = language.Texts([str(DATA / f"{name}.validation.txt")], 128, 2048)
        language.of_model(expert(name), texts, kind, only=["mlp"]).save(file)
    return str(file)


def recipe(method: str, setting: Setting, statistics: Path) -> dict[str, Any]:
    chosen = get(method)
    models = [{"model": expert(name), "parameters": dict(setting["model"])} for name in DOMAINS]
    if chosen.needs_data is not None:
        for name, entry in zip(DOMAINS, models, strict=True):
            entry["statistics"] = collected(name, chosen.needs_data, statistics)
    return {
        "merge_method": method,
        "models": models,
        **({"base_model": "smollm2"} if chosen.needs_base == "required" else {}),
        "parameters": dict(setting["method"]),
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def merged(method: str, setting: Setting, folder: Path) -> Any:
    mf.merge(recipe(method, setting, folder.parent), folder, overwrite=True)
    return loaded(folder)


class Bench:
    """The base's and the experts' own figures, and the rows found so far."""

    def __init__(self, characters: int, journal: Path | None) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(resolve_llm("smollm2").path)
        self.held = {"validation": texts("validation", characters // 3), "test": texts("test", characters)}
        self.journal = Journal(journal, f"language bench {characters}", resume=True) if journal else None
        self.cells: dict[str, Any] = self.journal.cells if self.journal else {}

    def cell(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.cells:
            found = make()
            if self.journal:
                self.journal.add(key, found)
            else:
                self.cells[key] = found
        return self.cells[key]

    def own(self, name: str) -> dict[str, Any]:
        """Nats of the base (name "base") or of one expert, on both sides."""

        def make() -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                if name == "base":
                    model = loaded(resolve_llm("smollm2").path)
                else:
                    one = {"model": expert(name)}
                    mf.merge(
                        {"merge_method": "passthrough", "models": [one], "dtype": "bfloat16"}, folder, overwrite=True
                    )
                    model = loaded(Path(folder))
                return {side: nats(model, self.tokenizer, held) for side, held in self.held.items()}

        return self.cell(f"own/{name}", make)

    def kept(self, found: dict[str, float], side: str) -> dict[str, float]:
        """The share of each expert's own gain that `found` has."""
        base = self.own("base")[side]
        return {d: (base[d] - found[d]) / (base[d] - self.own(d)[side][d]) for d in DOMAINS}

    def method(self, name: str, candidates: list[Setting]) -> dict[str, Any]:
        """Choose a setting on the validation texts, then read the test texts once."""

        def make() -> dict[str, Any]:
            tried, cpu = [], time.process_time()
            with tempfile.TemporaryDirectory() as root:
                folder = Path(root) / "merged"
                for setting in candidates:
                    model = merged(name, setting, folder)
                    found = self.kept(nats(model, self.tokenizer, self.held["validation"]), "validation")
                    tried.append((sum(found.values()) / len(found), setting))
                best = max(tried, key=lambda one: one[0])[1]
                if best is not candidates[-1]:
                    model = merged(name, best, folder)
                test = nats(model, self.tokenizer, self.held["test"])
                size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
            return {
                "setting": best, "nats": test, "kept": self.kept(test, "test"), "bytes": size,
                "tried": tried, "cpu": time.process_time() - cpu,
            }  # fmt: skip

        return self.cell(f"method/{name}", make)

    def twin(self) -> dict[str, Any]:
        """Twin-Merging: see `language_bench_twin.py`."""

        def make() -> dict[str, Any]:
            experts = {name: expert(name) for name in DOMAINS}
            read = {name: DATA / f"{name}.validation.txt" for name in DOMAINS}
            with tempfile.TemporaryDirectory() as root:
                found = measure_twin(experts, read, self.held["test"], Path(root) / "twin")
            return {**found, "kept": self.kept(found["nats"], "test")}

        return self.cell("method/twin", make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join((*CANDIDATES, "twin")))
    parser.add_argument("--characters", type=int, default=12_000, help="of each test text; a third of it to choose on")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if missing := {m.name for m in all_methods()} - set(CANDIDATES) - set(ONE_OR_TWO):
        parser.error(f"no candidates for {', '.join(sorted(missing))}: add them to CANDIDATES")
    logging.disable_progress_bar()
    bench, console = Bench(a.characters, a.journal), Console(width=150)
    table = Table("model", *(f"{d}: ppl (kept)" for d in DOMAINS), "mean kept", "MB", "setting")
    base = bench.own("base")["test"]
    table.add_row("base", *(f"{math.exp(base[d]):.2f}" for d in DOMAINS), "0", "269", "")
    for name in DOMAINS:
        own = bench.own(name)["test"]
        table.add_row(f"expert {name}", *(f"{math.exp(own[d]):.2f}" for d in DOMAINS), "", "1.5", "")
    for name in a.methods.split(","):
        row = bench.twin() if name == "twin" else bench.method(name, CANDIDATES[name])
        shown = [f"{math.exp(row['nats'][d]):.2f} ({row['kept'][d]:.2f})" for d in DOMAINS]
        mean = sum(row["kept"].values()) / len(DOMAINS)
        table.add_row(name, *shown, f"{mean:.2f}", f"{row['bytes'] / 1e6:.0f}", json.dumps(row["setting"]))
        print(name, f"{mean:.3f}", row["setting"], f"{row['cpu']:.0f} s", row.get("router", ""), flush=True)
    console.print(table)
    print("left out, since they take one or two models, or need an aligned one:", ", ".join(ONE_OR_TWO))
    about = machine() | {"torch": torch.__version__, "characters": a.characters, "seeds": "one training of each expert"}
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    if a.json:
        a.json.write_text(json.dumps({"machine": about, "cells": bench.cells}, indent=1))


if __name__ == "__main__":
    main()
