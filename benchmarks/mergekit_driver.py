"""Runs many recipes in one process of a Python that has mergekit: `PYTHON mergekit_driver.py JOBS.json`.

A job is {"recipe": text, "out": folder, "masks": file or null}. Where masks are given, torch.bernoulli returns
them instead of drawing: the file holds "shape|number of the model" → mask, so shapes must be unique. Jobs that
fail are reported, one JSON line each, and the others go on.
"""

import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def handed(masks: dict[str, torch.Tensor]) -> Any:
    """A torch.bernoulli that hands out the masks of a shape in the models' order."""
    seen: Counter[str] = Counter()

    def bernoulli(probability: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shape = "x".join(str(n) for n in probability.shape if n > 1)  # a vector may come as one row
        mask = masks[f"{shape}|{seen[shape]}"]
        seen[shape] += 1
        return mask.view(probability.shape).to(probability.dtype)

    return bernoulli


def run(job: dict[str, Any]) -> None:
    real = torch.bernoulli
    if job["masks"]:
        torch.bernoulli = handed(torch.load(job["masks"], weights_only=True))
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(job["recipe"]))
        run_merge(config, job["out"], MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))
    finally:
        torch.bernoulli = real


for item in json.loads(Path(sys.argv[1]).read_text()):
    try:
        run(item)
        print(json.dumps({"out": item["out"], "error": None}), flush=True)
    except Exception as error:  # reported, and the next job runs
        traceback.print_exc()
        print(json.dumps({"out": item["out"], "error": f"{type(error).__name__}: {error}"}), flush=True)
