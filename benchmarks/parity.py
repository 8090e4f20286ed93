"""The same recipes through mergekit and through us: written tensors compared, bit by bit.

    python benchmarks/parity.py --mergekit PYTHON [--methods ties,della] [--json FILE]

For every method on small bf16 checkpoints (with the names of Llama, GPT-2 and Qwen, and heavily tied differences):
1. at `dtype: float32, out_dtype: bfloat16`, the largest distance in units in the last place between the two
   written results, and the share of elements left out: those at a trimming threshold (mergekit's sort is
   unstable) and those whose weighted differences cancel to 1e-6 (rounding decides their sign);
2. at `dtype: bfloat16`, each tool's mean error against the float64 formula, divided by the error that rounding
   the exact result to bf16 makes.
Random methods get our masks: mergekit's draw is replaced by them (`mergekit_driver.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from made_models import STEP, Shape, make
from measure import machine
from mergekit_runs import read, run_mergekit

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / name) for name in ("src", "tests")]

from model_fusion.merge.engine import merge  # noqa: E402
from model_fusion.merge.methods import Key, build, get  # noqa: E402
from parity import reference  # noqa: E402

SEEDS = {"base": 1, "one": 2, "two": 3, "three": 4, "far": 5}
FAR = 0.05
"""The step of `far`, on which arcee_fusion is compared. On near fine-tunes its divergence of two softmax rows is
1e-7: mergekit takes it in float32, where that is rounding noise (a third of the rows come out negative)."""
RECIPE_SEED = 7
# unequal sizes of everything: masks are told apart by their shapes
CHECKPOINTS = {
    "llama": Shape(3000, 256, 704, 2, "llama"),
    "gpt2": Shape(3000, 256, 1024, 2, "gpt2"),
    "qwen2": Shape(3000, 256, 704, 2, "qwen2"),
}


@dataclass(frozen=True)
class Case:
    """A method and its parameters; models: the fine-tunes merged; base: whether the recipe names it."""

    method: str
    want: reference.Reference
    each: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ("one", "two")
    base: bool = True
    weights: tuple[float, ...] = ()
    random: bool = False

    @property
    def name(self) -> str:
        return self.method if self.base or self.method != "nuslerp" else "nuslerp (no base)"

    def each_of(self, i: int) -> dict[str, Any]:
        return self.each | ({"weight": self.weights[i]} if self.weights else {})

    def recipe(self, folder: Path, dtype: str) -> dict[str, Any]:
        models = [{"model": str(folder / n), "parameters": self.each_of(i)} for i, n in enumerate(self.models)]
        if self.method in ("slerp", "nearswap", "arcee_fusion"):
            models.append({"model": str(folder / "base"), "parameters": {}})
        text = {"merge_method": self.method, "models": models, "dtype": dtype, "out_dtype": "bfloat16"}
        text |= {"base_model": str(folder / "base")} if self.base else {}
        return text | ({"parameters": self.params} if self.params else {})


DENSE, W = {"density": 0.5}, (0.6, 0.3)
CASES = [
    Case("linear", reference.linear, base=False, weights=W),
    Case("passthrough", reference.passthrough, {"scale": 0.7}, {}, ("one",), False),
    Case("task_arithmetic", reference.task_arithmetic, weights=W, params={"lambda": 0.8}),
    Case("slerp", reference.slerp, {}, {"t": 0.3}, ("one",)),
    Case("nuslerp", reference.nuslerp, weights=W),
    Case("nuslerp", reference.nuslerp, weights=W, base=False),
    # without a base: mergekit refuses differences that are all zero, which norms' are
    Case("multislerp", reference.multislerp, {}, {}, ("one", "two", "three"), False, (0.5, 0.3, 0.2)),
    Case("karcher", reference.karcher, {}, {}, ("one", "two", "three"), False),
    Case("ties", reference.ties, DENSE, weights=W),
    Case("breadcrumbs", reference.breadcrumbs, DENSE | {"gamma": 0.01}, weights=W),
    Case("breadcrumbs_ties", reference.breadcrumbs_ties, DENSE | {"gamma": 0.01}, weights=W),
    Case("dare_linear", reference.dare_linear, DENSE, weights=W, random=True),
    Case("dare_ties", reference.dare_ties, DENSE, weights=W, random=True),
    Case("della", reference.della, DENSE | {"epsilon": 0.15}, weights=W, random=True),
    Case("della_linear", reference.dare_linear, DENSE | {"epsilon": 0.15}, weights=W, random=True),
    Case("model_stock", reference.model_stock),
    Case("sce", reference.sce, {}, {"select_topk": 0.5}, ("one", "two", "three")),
    Case("arcee_fusion", reference.arcee_fusion, {}, {}, ("far",)),
    Case("nearswap", reference.nearswap, {}, {"t": 2e-4}, ("one",)),
    Case("ram", reference.ram),
    Case("ramplus_tl", reference.ramplus_tl),
]


@dataclass(frozen=True)
class Made:
    """What a case merges, in memory: tensors by model, and each tensor's masks."""

    case: Case
    tensors: dict[str, dict[str, Tensor]]

    def inputs(self, name: str) -> tuple[list[Tensor], Tensor | None]:
        models = [self.tensors[m][name] for m in self.case.models]
        return models, self.tensors["base"][name] if self.case.base else None

    def state(self, name: str) -> Any:
        """The statistics of our method on one tensor: cuts, masks, coefficients."""
        method, case = get(self.case.method), self.case
        each = [build(method.model_params, case.each_of(i), method.name) for i in range(len(case.models))]
        params = build(method.params, case.params, method.name)
        assert method.statistics is not None
        return method.statistics(*self.inputs(name), each, params, Key(RECIPE_SEED, name))

    def masks(self, name: str) -> list[Tensor]:
        return [mask.bool().view(self.tensors["base"][name].shape) for mask, _ in self.state(name)]

    def exact(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The formula in float64."""
        models, base = self.inputs(name)
        params = {"lambda_" if k == "lambda" else k: v for k, v in self.case.params.items()}
        if self.case.method == "slerp" or base is not None:
            base = self.tensors["base"][name]
        wide = [m.double().numpy() for m in models]
        masks = [m.numpy() for m in self.masks(name)] if self.case.random else []
        each = [self.case.each_of(i) for i in range(len(models))]
        return np.asarray(self.case.want(wide, None if base is None else base.double().numpy(), each, params, masks))

    def excluded(self, name: str) -> Tensor:
        """bool: at a trimming threshold, or a sum whose terms cancel to a millionth."""
        models, base = self.inputs(name)
        terms = sum(t.double().abs() for t in (*models, *([] if base is None else [base])))
        out = torch.from_numpy(np.abs(self.exact(name))) <= 1e-6 * terms
        if base is None or self.case.method not in ELECTED | {"breadcrumbs", "arcee_fusion"}:
            return out
        deltas = [m.float() - base.float() for m in models]
        if self.case.method == "arcee_fusion":
            importance, edge = reference.arcee_importance(models[0].double().numpy(), base.double().numpy())
            return out | torch.from_numpy(np.abs(importance - edge) <= 1e-3 * edge)
        state = self.state(name)
        if self.case.method == "sce":
            variance = torch.stack(deltas).double().var(0, unbiased=False)
            edge = float(state[0].threshold)
            out |= (variance - edge).abs() <= 1e-5 * edge
            deltas = [d * (variance >= edge) for d in deltas]
        for i, delta in enumerate(deltas):
            if self.case.random:
                deltas[i] = delta * self.masks(name)[i]
            elif self.case.method != "sce":
                cuts = state[i] if isinstance(state[i], list) else [state[i]]
                for cut in cuts:
                    out |= delta.abs() == cut.threshold
                flat = cuts[-1].drop_small_(delta.reshape(-1).clone(), 0)
                deltas[i] = flat.view(delta.shape)
        if self.case.method in ELECTED:
            parts = [w * d.double() for w, d in zip(self.case.weights or [1.0] * len(deltas), deltas, strict=True)]
            size = sum(p.abs() for p in parts)
            out |= (abs(sum(parts)) <= 1e-6 * size) & (size > 0)
        return out


ELECTED = {"ties", "breadcrumbs_ties", "dare_ties", "della", "sce"}


def steps(a: Tensor, b: Tensor) -> Tensor:
    """Distance of two bf16 tensors in units in the last place."""
    ordered = [x.view(torch.int16).to(torch.int32) for x in (a, b)]
    ordered = [torch.where(x < 0, -(x & 0x7FFF), x) for x in ordered]
    return (ordered[0] - ordered[1]).abs()


def compare(made: Made, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Any]:
    worst, apart, off, left_out, total = 0, 0, 0, 0, 0
    if set(ours) != set(theirs):
        return {"error": f"tensors differ: {sorted(set(ours) ^ set(theirs))[:3]}"}
    for name, tensor in ours.items():
        out = made.excluded(name)
        distance = steps(tensor, theirs[name])[~out]
        worst = max(worst, int(distance.max()) if distance.numel() else 0)
        apart += int((distance > 1).sum())
        exact = torch.from_numpy(made.exact(name)).bfloat16()
        off += int((steps(tensor, exact)[~out] > 1).sum())
        left_out += int(out.sum())
        total += tensor.numel()
    return {"worst_ulp": worst, "over_1_ulp": apart, "ours_off": off, "excluded": left_out / total, "elements": total}


def error_ratio(made: Made, got: dict[str, Tensor]) -> float:
    """Σ|written − exact| ÷ Σ|rounded exact − exact|, over all compared elements."""
    mine = least = 0.0
    for name, tensor in got.items():
        exact, inside = made.exact(name), ~made.excluded(name).numpy()
        rounded = torch.from_numpy(exact).bfloat16().double().numpy()
        mine += float(np.abs(tensor.double().numpy() - exact)[inside].sum())
        least += float(np.abs(rounded - exact)[inside].sum())
    return mine / least if least else 1.0 if mine == 0 else math.inf


def jobs_of(style: str, folder: Path, cases: list[Case]) -> list[dict[str, Any]]:
    tensors = {n: load_file(folder / n / "model.safetensors") for n in SEEDS}
    jobs = []
    for number, case in enumerate(cases):
        made, masks = Made(case, tensors), None
        if case.random:
            table = {}
            for name, tensor in tensors["base"].items():
                for i, mask in enumerate(made.masks(name)):
                    table["x".join(map(str, tensor.shape)) + f"|{i}"] = mask
            if len(table) != len(case.models) * len(tensors["base"]):
                raise ValueError(f"{style}: two tensors of one shape; masks cannot be told apart")
            masks = folder / f"masks-{number}.pt"
            torch.save(table, masks)
        for dtype in ("float32", "bfloat16"):
            recipe = yaml.safe_dump(case.recipe(folder, dtype) | {"seed": RECIPE_SEED})
            path = folder / f"{number}-{dtype}.yml"
            path.write_text(recipe)
            theirs = yaml.safe_dump(case.recipe(folder, dtype))
            job = {"recipe": theirs, "out": str(folder / f"mk-{number}-{dtype}"), "ours": str(path), "made": made}
            jobs.append(job | {"masks": None if masks is None else str(masks)})
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", metavar="PYTHON", help="a Python that has mergekit; without it only our errors")
    parser.add_argument("--methods", help="comma-separated; all where omitted")
    parser.add_argument("--checkpoints", default=",".join(CHECKPOINTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    wanted = options.methods.split(",") if options.methods else [case.method for case in CASES]
    cases = [case for case in CASES if case.method in wanted]
    facts = {"seeds": SEEDS, "recipe_seed": RECIPE_SEED, "mergekit": options.mergekit is not None, **machine()}
    print(json.dumps(facts, indent=1), flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        jobs = []
        for style in options.checkpoints.split(","):
            folder = Path(temporary) / style
            for name, seed in SEEDS.items():
                base_seed = None if name == "base" else SEEDS["base"]
                step = FAR if name == "far" else STEP
                make(folder / name, CHECKPOINTS[style], seed, base_seed, unique=True, step=step)
            jobs += [job | {"style": style} for job in jobs_of(style, folder, cases)]
        errors = run_mergekit(options.mergekit, jobs, Path(temporary)) if options.mergekit else {}
        for first, second in zip(jobs[::2], jobs[1::2], strict=True):
            rows.append(row(first, second, errors, options.mergekit is not None))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


def row(single: dict[str, Any], half: dict[str, Any], errors: dict[str, str | None], both: bool) -> dict[str, Any]:
    """One line of the table: the job at float32 and the one at bfloat16."""
    made: Made = single["made"]
    out: dict[str, Any] = {"checkpoint": single["style"], "method": made.case.name}
    ours = [read(merge(Path(job["ours"]), Path(job["ours"]).with_suffix(".out"))) for job in (single, half)]
    out["our_error"] = error_ratio(made, ours[1])
    if both:
        failed = [errors[job["out"]] for job in (single, half)]
        out |= {"error": failed[0]} if failed[0] else compare(made, ours[0], read(Path(single["out"])))
        out["mergekit_error"] = None if failed[1] else error_ratio(made, read(Path(half["out"])))
    return out


def table(rows: list[dict[str, Any]]) -> str:
    head = "| checkpoint | method | worst ulp | over 1 ulp | ours over 1 ulp from float64 | excluded % "
    lines = [head + "| our error at bf16 | mergekit's |", "|---" * 8 + "|"]
    for item in rows:
        cells = [item["checkpoint"], item["method"]]
        if "worst_ulp" in item:
            cells += [str(item[key]) for key in ("worst_ulp", "over_1_ulp", "ours_off")]
            cells.append(f"{100 * item['excluded']:.3f}")
        else:
            cells += [item.get("error", "mergekit not run"), *"–––"]
        other = item.get("mergekit_error")
        cells += [f"{item['our_error']:.4f}", "–" if other is None else f"{other:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
