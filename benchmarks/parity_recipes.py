"""The forms that recipes take in the wild, through mergekit and through us: every written tensor compared.

    python benchmarks/parity_recipes.py --mergekit PYTHON [--json FILE]

Each form runs at `dtype: float32` on small Llama-like checkpoints. The methods are those without sorts or draws, whose
results do not hang on how equal numbers are ordered (`parity.py` compares the others). Printed for each form: the
largest difference over the largest weight, and the tensors where it is above 5e-6 (more than float32 rounding makes).
`expected` names the tensors in which we depart from mergekit on purpose.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made_models import Shape, make
from measure import machine
from mergekit_runs import read, run_mergekit

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / "src")]

from model_fusion.merge.engine import merge  # noqa: E402

SEEDS = {"base": 1, "a": 2, "b": 3, "c": 4}
LARGEST = 5e-6
_ENDS = ("lm_head.weight",)  # the final norm of these checkpoints is 1 in every model


@dataclass(frozen=True)
class Form:
    """A recipe without its dtype; `expected`: tensors that are not mergekit's."""

    text: str
    expected: tuple[str, ...] = ()


def _two(
    method: str, more: str = "", first: str = "0.4", second: str = "0.6", base: str = "base", each: bool = True
) -> str:
    one, two = (f", parameters: {{weight: {weight}}}" if each else "" for weight in (first, second))
    models = f"[{{model: a{one}}}, {{model: b{two}}}]"
    return f"merge_method: {method}\n" + (f"base_model: {base}\n" if base else "") + f"models: {models}\n{more}"


def _slices(method: str, slices: list[str], more: str = "") -> str:
    return f"merge_method: {method}\n{more}slices:\n" + "".join(f"- sources: [{s}]\n" for s in slices)


def _part(model: str, low: int, high: int, parameters: str = "") -> str:
    return f"{{model: {model}, layer_range: [{low}, {high}]" + (
        f", parameters: {{{parameters}}}}}" if parameters else "}"
    )


_BY_PART = "[{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}, {filter: mlp, value: [1, 0.5, 0]}, {value: 0.5}]"
_BY_NAME = "[{filter: embed_tokens, value: 0.9}, {filter: layers.1., value: 2}, {value: 0.5}]"
_NO_OUTPUT = "scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0.0}, {value: 1.0}]"
FORMS = {
    "whole models": Form(_two("linear", base="")),
    "base among the models": Form(_two("task_arithmetic", base="a")),
    "weights by filter": Form(_two("linear", "", _BY_NAME, base="")),
    "filter that matches all": Form(_two("linear", "", "[{filter: '*', value: 0.3}]", base="")),
    "gradient, by filter, over slices": Form(
        _slices("slerp", [f"{_part('a', 0, 8)}, {_part('b', 0, 8)}"], f"base_model: a\nparameters: {{t: {_BY_PART}}}\n")
    ),
    "gradient over whole models": Form(_two("linear", "", "[0, 0.3, 0.7]", base=""), _ENDS),
    "stacked layers": Form(_slices("passthrough", [_part("a", 0, 4), _part("b", 2, 6), _part("a", 4, 8)])),
    "layers added with their outputs at 0": Form(
        _slices("passthrough", [_part("a", 0, 3), _part("a", 2, 3, _NO_OUTPUT), _part("a", 3, 8)])
    ),
    "slices of other models each": Form(
        _slices(
            "linear",
            [
                _part("a", 0, 4, "weight: [0.2, 0.8]") + ", " + _part("b", 0, 4, "weight: 0.5"),
                _part("b", 2, 6, "weight: 1.0") + ", " + _part("c", 4, 8, "weight: 0.25"),
            ],
        )
    ),
    "more models in the last slice": Form(
        _slices(
            "linear",
            [
                _part("a", 0, 4, "weight: 0.2"),
                _part("b", 4, 8, "weight: 1.0") + ", " + _part("c", 4, 8, "weight: 0.25"),
            ],
        ),
        _ENDS,
    ),
    "parameters at the slice and above it": Form(
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nslices:\n"
        + "".join(f"- sources: [{_part('a', i, i + 4)}, {_part('b', i, i + 4)}]\n{p}" for i, p in
                  ((0, "  parameters: {t: 0.3}\n"), (4, "")))
    ),
    "lambda under a model": Form(_two("task_arithmetic", "parameters: {lambda: 0.9}\n", "0.5, lambda: 0.2")),
    "numbers with exponents": Form(_two("karcher", "parameters: {tol: 1e-5}\n", base="", each=False)),
    "numbers in quotes": Form(_two("linear", "", "'0.5'", base="")),
    "models taken apart": Form(_two("linear", base="").replace("model: a", "model: {model: {path: a}}")),
    "random_seed": Form(_two("task_arithmetic", "random_seed: 42\n")),
    "int8_mask": Form(_two("task_arithmetic", "parameters: {int8_mask: true}\n")),
    "a module": Form(
        "merge_method: linear\nmodules: {default: {models: ["
        "{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.7}}]}}\n"
    ),
    "a chat template": Form(_two("nuslerp", "chat_template: chatml\n", base="")),
}  # fmt: skip


def compared(ours: Path, theirs: Path) -> dict[str, Any]:
    """Largest difference over the largest weight, and where it is too large. Raises KeyError for other names."""
    one, two = read(ours), read(theirs)
    if one.keys() != two.keys():
        raise KeyError(f"other tensors: {sorted(one.keys() ^ two.keys())[:3]}")
    gaps = {n: float((one[n].double() - two[n].double()).abs().max() / two[n].double().abs().max()) for n in one}
    off = sorted(name for name, gap in gaps.items() if gap > LARGEST)
    return {"largest": max(gap for name, gap in gaps.items() if name not in off), "off": off}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", metavar="PYTHON", required=True, help="a Python that has mergekit")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    facts = {"seeds": SEEDS, **machine()}
    print(json.dumps(facts, indent=1), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        for name, seed in SEEDS.items():
            make(room / name, Shape(300, 64, 128, 8), seed, None if name == "base" else SEEDS["base"])
        jobs = []
        for number, form in enumerate(FORMS.values()):
            text = form.text + "dtype: float32\n"
            (room / f"{number}.yml").write_text(text)
            jobs.append({"recipe": text, "out": str(room / f"mk-{number}"), "masks": None})
        errors = run_mergekit(options.mergekit, jobs, room, cwd=room)
        for number, (name, form) in enumerate(FORMS.items()):
            row: dict[str, Any] = {"form": name, "expected": list(form.expected), "error": errors[jobs[number]["out"]]}
            if row["error"] is None:
                row |= compared(merge(room / f"{number}.yml", room / f"our-{number}"), room / f"mk-{number}")
                row["as_expected"] = set(row["off"]) == set(form.expected)
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(f"{sum(row.get('as_expected', False) for row in rows)} of {len(rows)} as expected")
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
