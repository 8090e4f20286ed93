"""Does a search of 100 trials find what a fine grid finds? Three fine-tunes of one small network, three weights.

python benchmarks/search.py --json out.json [--seeds 10 11 12 13 14] [--trials 100] [--grid 21]

Per seed: a network 64-64-10 is trained shortly on three tasks at once (digits as they are, turned by 90 degrees,
inverted), then fine-tuned on each. A recipe adds the three task vectors with one weight in [0, 1.5] each; the metric is
the mean accuracy of the three tasks. Every sampler searches on validation images; the fine grid tries every combination
on the same images. Test images are read once a search, for the winner and for plain task arithmetic. The default
seeds were not looked at while the samplers were set up.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import model_fusion as mf
from measure import machine
from model_fusion.evaluate.machine import versions
from model_fusion.evaluate.statistics import interval
from model_fusion.search.study import SAMPLERS

TASKS = ("as they are", "turned", "inverted")
TOP = 1.5
Data = dict[str, Tensor]


def digits(seed: int) -> tuple[Data, Data, Data]:
    """Training, validation and test images [3, N, 64] with their labels [N]; 60, 20 and 20 %."""
    raw = load_digits()
    x, y = torch.tensor(raw.images / 16, dtype=torch.float32), torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    tasks = torch.stack([x, torch.rot90(x, 1, (1, 2)), 1 - x]).flatten(2)
    cuts = (0, len(x) * 3 // 5, len(x) * 4 // 5, len(x))
    parts = [order[a:b] for a, b in pairwise(cuts)]
    first, second, third = ({"x": tasks[:, part].clone(), "y": y[part].clone()} for part in parts)
    return first, second, third


def logits(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.relu(x @ weights["0.weight"].T + weights["0.bias"])
    return hidden @ weights["2.weight"].T + weights["2.bias"]


def accuracy(weights: Mapping[str, Tensor], data: Data) -> float:
    """Mean over the tasks."""
    return float((logits(weights, data["x"]).argmax(-1) == data["y"]).float().mean())


def train(start: Mapping[str, Tensor] | None, x: Tensor, y: Tensor, steps: int, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    if start is not None:
        net.load_state_dict(dict(start))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def models(folder: Path, data: Data, seed: int) -> dict[str, Any]:
    """Writes base and fine-tunes; returns the recipe."""
    every = torch.cat(list(data["x"])), data["y"].repeat(len(TASKS))
    base = train(None, *every, 150, seed)
    save_file(base, folder / "base.safetensors")
    for number in range(len(TASKS)):
        save_file(
            train(base, data["x"][number], data["y"], 150, seed + number + 1), folder / f"task{number}.safetensors"
        )
    weight = {"range": [0, TOP]}
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base.safetensors"),
        "models": [
            {"model": str(folder / f"task{i}.safetensors"), "parameters": {"weight": dict(weight)}}
            for i in range(len(TASKS))
        ],
    }


@torch.no_grad()
def fine_grid(folder: Path, validation: Data, test: Data, points: int) -> dict[str, Any]:
    """The best of points³ combinations on validation, and what the first such combination gets on test."""
    base = load_file(folder / "base.safetensors")
    tuned = [load_file(folder / f"task{i}.safetensors") for i in range(len(TASKS))]
    deltas = [{name: one[name] - base[name] for name in base} for one in tuned]
    axis = [TOP * i / (points - 1) for i in range(points)]

    def at(weights: tuple[float, ...]) -> dict[str, Tensor]:
        return {n: base[n] + sum(w * d[n] for w, d in zip(weights, deltas, strict=True)) for n in base}

    best = max(product(axis, repeat=len(TASKS)), key=lambda weights: accuracy(at(weights), validation))
    experts = [accuracy_of_one(one, test, i) for i, one in enumerate(tuned)]
    return {
        "weights": list(best),
        "validation": 100 * accuracy(at(best), validation),
        "test": 100 * accuracy(at(best), test),
        "base": 100 * accuracy(base, test),
        "experts": 100 * sum(experts) / len(experts),
    }


def accuracy_of_one(weights: Mapping[str, Tensor], data: Data, task: int) -> float:
    return float((logits(weights, data["x"][task]).argmax(-1) == data["y"]).float().mean())


def one_seed(seed: int, trials: int, points: int) -> dict[str, Any]:
    training, validation, test = digits(seed)
    result: dict[str, Any] = {"seed": seed}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = models(folder, training, seed)
        began = time.process_time()
        result["fine"] = {**fine_grid(folder, validation, test, points), "cpu": time.process_time() - began}
        for sampler in SAMPLERS:
            opened: list[int] = []

            def read_test(opened: list[int] = opened) -> Data:
                opened.append(1)
                return test

            began = time.process_time()
            found = mf.search(
                recipe, folder / sampler, metric=accuracy, validation=validation, test=read_test, trials=trials,
                sampler=sampler, seed=seed,
            ).report  # fmt: skip
            scores = [trial["score"] for trial in found["trials"] if trial["score"] is not None]
            result[sampler] = {
                "validation": 100 * max(scores),
                "test": 100 * found["test"]["winner"],
                "plain": 100 * found["test"]["task_arithmetic"],
                "gain": 100 * found["test"]["gain"],
                "behind": result["fine"]["validation"] - 100 * max(scores),
                "behind_on_test": result["fine"]["test"] - 100 * found["test"]["winner"],
                "test_reads": len(opened),
                "cpu": time.process_time() - began,
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--grid", type=int, default=21)
    args = parser.parse_args()
    runs = [one_seed(seed, args.trials, args.grid) for seed in args.seeds]
    summary = {
        sampler: {
            key: interval([run[sampler][key] for run in runs]).to_json()
            for key in ("validation", "behind", "test", "plain", "gain", "behind_on_test", "cpu")
        }
        for sampler in SAMPLERS
    }
    report = {"machine": machine(), "versions": versions(), **vars(args), "runs": runs, "summary": summary}
    args.json.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    grid = [run["fine"] for run in runs]
    print(f"{len(args.seeds)} seeds, {args.trials} trials, fine grid of {args.grid ** len(TASKS)}; points of accuracy")
    labels = {
        "validation": "fine grid, validation",
        "test": "fine grid, test",
        "base": "base, test",
        "experts": "experts, test",
    }
    for key in labels:
        print(f"  {labels[key]:<24}{interval([g[key] for g in grid]).mean:8.2f}")
    print(
        f"{'':<10}{'behind grid, validation':>26}{'test':>10}{'gain over TA, test':>28}{'test reads':>12}{'CPU s':>8}"
    )
    for sampler, row in summary.items():
        worst = max(run[sampler]["behind"] for run in runs)
        reads = sorted({run[sampler]["test_reads"] for run in runs})
        gain = row["gain"]
        spread = "" if gain["low"] is None else f" [{gain['low']:+.2f}, {gain['high']:+.2f}]"
        behind = f"{row['behind']['mean']:.2f}, worst {worst:.2f}"
        print(
            f"{sampler:<10}{behind:>26}{row['test']['mean']:>10.2f}{gain['mean']:>+10.2f}{spread:>18}"
            f"{'/'.join(map(str, reads)):>12}{row['cpu']['mean']:>8.1f}"
        )


if __name__ == "__main__":
    main()
