"""Two LLMs of different vocabularies: each alone, and both together, on four kinds of text.

    python benchmarks/ensembles.py --second gemma.gguf [--first smollm2] [--characters 8000] [--json FILE]

Without --second, the first model stands beside itself: then all columns of a kind must be equal.

`bits`: bits per byte of the committed held-out texts (lower is better), of each model and of the mean of their
probabilities between common token boundaries. `next words`: UniTE's greedy continuation of cut texts: the share whose
first word is the text's own, beside each model's own greedy continuation.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from language_texts import DOMAINS
from measure import machine
from model_fusion.dynamic.ensemble import ensemble
from model_fusion.dynamic.union import Member, UnionOfModels
from model_fusion.errors import ModelFusionError
from model_fusion.evaluate.bits import bits_per_byte

DATA = Path(__file__).parent / "language_data"
CONTEXT = 400
"""Characters before a word that is to be said."""


def cuts(text: str, count: int) -> list[tuple[str, str]]:
    """(context, the word after it), evenly taken, each cut before a space."""
    places = [m.start() for m in re.finditer(r"(?<=\S) (?=\S)", text) if m.start() > CONTEXT]
    chosen = places[:: max(1, len(places) // count)][:count]
    return [(text[p - CONTEXT : p], text[p:].split(maxsplit=1)[0]) for p in chosen]


def first_words(model: UnionOfModels, asked: list[tuple[str, str]]) -> float:
    """The share of contexts whose greedy continuation begins with the text's own word."""
    right = 0
    for context, word in asked:
        said = model.generate(context, max_new_tokens=6).split(maxsplit=1)
        right += bool(said) and said[0] == word
    return right / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", default="smollm2")
    parser.add_argument("--second", help="a folder, hub id or GGUF file of another vocabulary")
    parser.add_argument("--characters", type=int, default=8000)
    parser.add_argument("--contexts", type=int, default=24)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.second is None:
        print(f"no --second given: {a.first} is measured beside itself; name a model of another vocabulary to compare")
    try:
        opened = ensemble([a.first, a.second or a.first], dtype=torch.bfloat16)
    except ModelFusionError as error:
        parser.error(str(error))
    alone: list[Member] = opened.members
    console, rows = Console(width=130), dict[str, Any]()
    table = Table("text", "bits: first", "second", "together", "next words: first", "second", "together")
    began = time.process_time()
    for domain in DOMAINS:
        text = (DATA / f"{domain}.test.txt").read_text(encoding="utf-8")[: a.characters]
        own, both = bits_per_byte(alone, text)
        asked = cuts(text, a.contexts)
        words = [first_words(UnionOfModels([member]), asked) for member in alone]
        united = first_words(opened.union, asked)
        rows[domain] = {"bits": own, "bits_together": both, "words": words, "words_together": united}
        numbers = [*own, both, *words, united]
        table.add_row(domain, *(f"{value:.3f}" for value in numbers))
        print(domain, rows[domain], flush=True)
    console.print(table)
    about = machine() | {"characters": a.characters, "contexts": a.contexts, "cpu": time.process_time() - began}
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    if a.json:
        a.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
