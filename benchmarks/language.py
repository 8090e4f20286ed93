"""Does the LLM keep its language? A Blackjack fusion, then five questions.

    python benchmarks/language.py [--bridges prefix,gated,lora] [--parts identical,perplexity,kl,speed,paraphrase]
                                  [--keep-language 0] [--phrasings 1] [--steps N] [--quick] [--seed 0]
                                  [--journal FILE] [--json FILE]

identical: logits without an expert, frozen base, are the plain LLM's bit for bit. perplexity: 100 kB of ordinary text
(docstrings of the Python standard library) with the bridge on and off, and as the answer to a prompt with the
expert's placeholder (without one no bridge acts), against the plain LLM told the expert's words there. kl: 50
unrelated prompts with the expert present, mean KL to the text oracle in nats a token (bar 0.1), and what is said
next. speed: CPU seconds a generated token, plain and fused alternately in this run (bar 1.05). paraphrase: agreement
with the expert on the test states after 10 prompts never trained on (bar 0.9). `--keep-language` is the weight of the
KL loss in training; `--phrasings` is how many of the committed training phrasings the examples are spread over. With
`--journal`, finished parts are kept.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from measure import machine
from model_fusion.evaluate.journal import Journal
from model_fusion.evaluate.language import (
    UNRELATED_PROMPTS,
    beside,
    identical_without_expert,
    kl_by_prompt,
    next_turns,
    perplexity,
    perplexity_beside,
)
from model_fusion.evaluate.tasks.base import Task
from model_fusion.evaluate.tasks.blackjack import PROMPT, blackjack_task
from model_fusion.fuse.fit import Example
from model_fusion.fuse.model import FusedModel

PHRASINGS = (
    PROMPT,
    "Table: <|table|>\nWhich move is right, hit or stick?",
    "Would you hit or stick with this table? <|table|>",
    "We play cards. <|table|>\nSay hit or stick.",
    "The dealer waits. With the table <|table|> in front of you, do you hit or stick?",
    "<|table|>\nHit, or stick?",
    "Answer with one word, hit or stick. The game: <|table|>",
    "What is the better choice for <|table|>, to stick or to hit?",
)
"""What `--phrasings` trains on; none is among the task's paraphrases."""
NEW_TOKENS = 48


def ordinary_text(size: int) -> str:
    """`size` characters of docstrings of the standard library, in order of file name."""
    found, length = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                found.append(text)
                length += len(text) + 2
        if length >= size:
            break
    return "\n\n".join(found)[:size]


def trained(task: Task, bridge: str, a: argparse.Namespace) -> FusedModel:
    fused = FusedModel.build(a.base, experts={"table": task.expert}, bridge=bridge, seed=a.seed)

    def spread(examples: tuple[Example, ...]) -> list[Example]:
        used = PHRASINGS[: a.phrasings]
        return [Example(used[i % len(used)], e.inputs, e.answer) for i, e in enumerate(examples)]

    cpu = time.process_time()
    history = fused.fit(
        spread(task.train),
        validation=spread(task.validation),
        seed=a.seed,
        keep_language=a.keep_language,
        progress=False,
        **({"steps": a.steps} if a.steps else {}),
    )
    cpu = time.process_time() - cpu
    print(f"{bridge}: {len(history.losses)} steps, {cpu:.1f} s of CPU, {history.stopped}", flush=True)
    return fused


def identical(fused: FusedModel, task: Task, a: argparse.Namespace) -> dict[str, Any]:
    return {"bit_identical": identical_without_expert(fused, UNRELATED_PROMPTS[:16])}


def perplexities(fused: FusedModel, task: Task, a: argparse.Namespace) -> dict[str, Any]:
    text = ordinary_text(10_000 if a.quick else 100_000)
    on = perplexity(fused, fused.tokenizer, text)
    with fused.bridge_off():
        off = perplexity(fused, fused.tokenizer, text)
    prompt = beside(UNRELATED_PROMPTS[:1], "table")[0]
    read, told = perplexity_beside(fused, prompt, task.test[0].inputs, text)
    return {
        "characters": len(text),
        "on": on,
        "off": off,
        "change": on / off - 1,
        "beside_expert": read,
        "told_instead": told,
        "change_beside_expert": read / told - 1,
    }


def divergence(fused: FusedModel, task: Task, a: argparse.Namespace) -> dict[str, Any]:
    prompts = beside(UNRELATED_PROMPTS[: 10 if a.quick else 50], "table")
    inputs = [task.test[i % len(task.test)].inputs for i in range(len(prompts))]
    found = kl_by_prompt(fused, prompts, inputs)
    tokens = torch.cat(found)
    return {
        "kl": float(tokens.mean()),
        "median": float(tokens.median()),
        "first_token": float(torch.stack([one[0] for one in found]).mean()),
        "worst_prompt": float(max(one.mean() for one in found)),
        "samples": next_turns(fused, PROMPT, UNRELATED_PROMPTS[:5], inputs[:5]),
    }


def speed(fused: FusedModel, task: Task, a: argparse.Namespace) -> dict[str, Any]:
    """Ratios of CPU seconds a token, fused / plain, in alternating pairs; the prompt's own time is subtracted."""
    inputs = task.test[0].inputs
    batch = fused.processor([PROMPT], [inputs])
    words = fused.experts["table"].describe([inputs["table"]])[0]
    plain = fused.processor([PROMPT.replace("<|table|>", words)])

    def seconds(model: Any, given: Any, tokens: int) -> float:
        start = time.process_time()
        model.generate(
            **given, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, temperature=None, top_p=None,
            top_k=None, pad_token_id=fused.tokenizer.pad_token_id,
        )  # fmt: skip
        return time.process_time() - start

    def a_token(model: Any, given: Any) -> float:
        return (seconds(model, given, NEW_TOKENS + 1) - seconds(model, given, 1)) / NEW_TOKENS

    pairs = []
    for number in range(4 if a.quick else 12):
        order = [(fused, batch), (fused.base, plain)]
        times = [a_token(*one) for one in (order if number % 2 else order[::-1])]
        pairs.append(times if number % 2 else times[::-1])
    pairs = pairs[1:]  # the first one warms up
    return {
        "ratio": statistics.median(f / p for f, p in pairs),
        "fused": statistics.median(f for f, _ in pairs),
        "plain": statistics.median(p for _, p in pairs),
    }


def paraphrases(fused: FusedModel, task: Task, a: argparse.Namespace) -> dict[str, Any]:
    shown = task.test[: 20 if a.quick else len(task.test)]
    each = {}
    for prompt in task.paraphrases:
        texts = fused.answer([prompt] * len(shown), [e.inputs for e in shown], max_new_tokens=8)
        each[prompt] = sum(task.parse(t) == e.answer for t, e in zip(texts, shown, strict=True)) / len(shown)
    return {"agreement": sum(each.values()) / len(each), "worst": min(each.values()), "each": each}


PARTS: dict[str, Callable[[FusedModel, Task, argparse.Namespace], dict[str, Any]]] = {
    "identical": identical,
    "perplexity": perplexities,
    "kl": divergence,
    "speed": speed,
    "paraphrase": paraphrases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridges", default="prefix,gated,lora")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--keep-language", type=float, default=0.0)
    parser.add_argument("--phrasings", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="of training; the bridge's own number where not given")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if not 1 <= a.phrasings <= len(PHRASINGS):
        parser.error(f"--phrasings: 1 to {len(PHRASINGS)}")
    parts = a.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}: one of {', '.join(PARTS)}")
    setting = {k: getattr(a, k) for k in ("keep_language", "phrasings", "steps", "base", "seed", "quick")}
    journal = Journal(a.journal, json.dumps(setting), resume=True) if a.journal else None
    cells: dict[str, Any] = journal.cells if journal else {}
    console = Console(width=140)
    task: Task | None = None
    for bridge in a.bridges.split(","):
        wanted = [part for part in parts if f"{bridge}/{part}" not in cells]
        if not wanted:
            continue
        task = task or blackjack_task(seed=a.seed)
        fused = trained(task, bridge, a)
        for part in wanted:
            key = f"{bridge}/{part}"
            found = PARTS[part](fused, task, a)
            cells[key] = found
            if journal:
                journal.add(key, found)
            console.print(key, {k: v for k, v in found.items() if k not in ("samples", "each")})
    for key, cell in cells.items():
        for sample in cell.get("samples", []):
            console.print(key, sample)
    about = machine() | {"torch": torch.__version__, "threads": torch.get_num_threads()} | setting
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    if a.json:
        a.json.write_text(json.dumps({"machine": about, "cells": cells}, indent=1))


if __name__ == "__main__":
    main()
