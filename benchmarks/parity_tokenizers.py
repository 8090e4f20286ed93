"""Models with different vocabularies through mergekit and through us: the rows of every token compared.

    python benchmarks/parity_tokenizers.py --mergekit PYTHON [--json FILE]

Three small Llamas whose tokenizers were trained on different text, and one recipe a case: union, base, one model's
tokenizer, sources of single tokens, padding, a chain of two merges. mergekit numbers new tokens in no fixed order, so
rows are matched by token. Written as bf16 from float32 arithmetic; distances in units in the last place. Elements that
cancel to 1e-6 of their tensor's largest are left out and counted: the rounding of the sum decides their digits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from measure import machine

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / name) for name in ("src", "tests")]

import model_fusion as mf  # noqa: E402
from architecture_fixtures import save  # noqa: E402
from tokenizer_fixtures import CORPUS, put, table, train  # noqa: E402

TEXTS = {
    "a": (CORPUS, 40, ("<eos>",)),
    "b": ("sunny dogs dream of warm summers in the sun", 48, ("<think>", "<eos>")),
    "c": ("cold cats creep over icy roofs in the moon light", 44, ("<tool>", "<eos>")),
}
BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")


def make(room: Path) -> None:
    for seed, (name, (text, size, special)) in enumerate(TEXTS.items()):
        folder = save("llama", room / name, seed)
        put(folder, train(text, size, special))
        state = load_file(folder / "model.safetensors")
        state = {k: v[:size].clone() if k in BY_TOKEN else v for k, v in state.items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": size}))


def cases(room: Path) -> dict[str, list[dict[str, Any]]]:
    a, b = str(room / "a"), str(room / "b")

    def entries(names: str, **each: float) -> list[dict[str, Any]]:
        return [{"model": str(room / n)} | ({"parameters": dict(each)} if each else {}) for n in names]

    mean = {"merge_method": "linear", "models": entries("abc", weight=0.4)}
    tokens = {
        "<eos>": {"source": b, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": a, "token": "<eos>"}},
        "<row>": {"source": {"kind": "model_token", "model": b, "token_id": 7}},
        "<none>": {"source": {"kind": "zero"}},
    }
    padded = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 32}
    slerp = {"merge_method": "slerp", "base_model": a, "models": entries("ab"), "parameters": {"t": 0.3}}
    stock = {"merge_method": "model_stock", "base_model": a, "models": entries("abc")}
    arithmetic = {"merge_method": "task_arithmetic", "base_model": a, "models": entries("abc", weight=0.4)}
    pair = {"merge_method": "linear", "base_model": a, "tokenizer_source": "base"}
    first = pair | {"name": "first", "models": entries("ab", weight=0.5)}
    second = [{"model": "first", "parameters": {"weight": 0.5}}, {"model": a, "parameters": {"weight": 0.5}}]
    return {
        "union, no base": [mean | {"tokenizer_source": "union"}],
        "union, base b": [mean | {"tokenizer_source": "union", "base_model": b}],
        "base": [mean | {"tokenizer_source": "base", "base_model": a}],
        "tokenizer of b, base a": [mean | {"tokenizer_source": b, "base_model": a}],
        "single tokens, padded": [mean | {"tokenizer": padded}],
        "union, task_arithmetic": [arithmetic | {"tokenizer_source": "union"}],
        "union, slerp": [slerp | {"tokenizer_source": "union"}],
        "union, model_stock": [stock | {"tokenizer_source": "union"}],
        "two merges in one file": [first, pair | {"models": second}],
    }


def ulps(one: Tensor, two: Tensor) -> tuple[int, int]:
    """Largest distance of two bf16 tensors in units in the last place, and the number of elements left out."""

    def ordered(tensor: Tensor) -> Tensor:
        bits = tensor.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    apart = (ordered(one) - ordered(two)).abs()
    left_out = (apart > 1) & (torch.maximum(one.abs(), two.abs()) <= 1e-6 * two.abs().max())
    return int(apart[~left_out].max()), int(left_out.sum())


def compare(room: Path, documents: list[dict[str, Any]], programs: Path) -> dict[str, Any]:
    recipe, theirs, ours = room / "recipe.yml", room / "theirs", room / "ours"
    full = [document | {"dtype": "float32", "out_dtype": "bfloat16"} for document in documents]
    recipe.write_text(yaml.safe_dump_all(full))
    words = [str(programs / "mergekit-yaml"), str(recipe), str(theirs)]
    if len(documents) > 1:
        words = [str(programs / "mergekit-multi"), str(recipe), "--intermediate-dir", str(room / "between")]
        words += ["--out-path", str(theirs)]
    subprocess.run(words, check=True, capture_output=True)
    mf.merge(recipe, ours, overwrite=True)
    want = {k: v for file in theirs.glob("*.safetensors") for k, v in load_file(file).items()}
    got = load_file(ours / "model.safetensors")
    ids = [table(json.loads((folder / "tokenizer.json").read_text())) for folder in (theirs, ours)]
    shared = sorted(ids[0].keys() & ids[1].keys())
    rows = [torch.tensor([table[token] for token in shared]) for table in ids]
    by_token = [ulps(want[name][rows[0]], got[name][rows[1]]) for name in BY_TOKEN]
    rest = [ulps(want[name], got[name]) for name in got if name not in BY_TOKEN]
    return {
        "tokens": len(shared),
        "tokens_of_one_only": len(ids[0].keys() ^ ids[1].keys()),
        "rows": [len(want[BY_TOKEN[1]]), len(got[BY_TOKEN[1]])],
        "worst_ulp_by_token": max(worst for worst, _ in by_token),
        "worst_ulp_elsewhere": max(worst for worst, _ in rest),
        "left_out": sum(count for _, count in by_token + rest),
        "elements": sum(tensor.numel() for tensor in got.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", type=Path, required=True, help="Python of an environment with mergekit 0.1.5.")
    parser.add_argument("--json", type=Path, help="Write the numbers here.")
    asked = parser.parse_args()
    results = {}
    print("| case | tokens | of one only | rows mergekit, ours | worst ulp by token | elsewhere | left out |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        make(Path(made))
        for label, documents in cases(Path(made)).items():
            with tempfile.TemporaryDirectory(dir=made) as place:
                for name in TEXTS:
                    (Path(place) / name).symlink_to(Path(made) / name)
                results[label] = found = compare(Path(place), documents, asked.mergekit.parent)
            rows = ", ".join(map(str, found["rows"]))
            cells = [label, found["tokens"], found["tokens_of_one_only"], rows]
            cells += [found["worst_ulp_by_token"], found["worst_ulp_elsewhere"]]
            cells.append(f"{found['left_out']} of {found['elements']}")
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine(), "seeds": [0, 1, 2], "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
