"""Do untrained gates route SmolLM2-135M's tokens by domain? Ridge, prefix, mean, and mergekit's hidden, in one run.

python benchmarks/mix_routing.py --json out.json

Python code, C++ headers and documentation are found on this machine. Accuracy is per token, at the true router
inputs, on files that no gate has seen; domains weigh the same, chance is 1/3. The mean is over layers.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from measure import machine
from model_fusion.checkpoint.llm import resolve_llm
from model_fusion.mix.build import plan
from model_fusion.mix.calibrate import calibrate, tokenizer_of, trunk_model, widened
from model_fusion.mix.statistics import router_inputs
from model_fusion.training.texts import split, windows

GATES = ("ridge", "prefix", "mean", "hidden", "hidden_avg")
WINDOW = 256


def domain_texts(count: int = 25) -> dict[str, list[str]]:
    """`count` files of each kind, evenly taken; licence headers (the first 1,500 characters) are passed over."""
    site, library = Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"])
    found = {
        "python": sorted(p for p in library.glob("*.py")),
        "headers": sorted((site / "torch" / "include" / "ATen").rglob("*.h")),
        "docs": sorted(p for p in site.glob("*.dist-info/METADATA")),
    }
    texts = {}
    for name, files in found.items():
        large = [p for p in files if p.stat().st_size > 6000]
        chosen = large[:: max(1, len(large) // count)][:count]
        texts[name] = [p.read_text(encoding="utf-8", errors="ignore")[1500:40_000] for p in chosen]
    return texts


def write_recipe(root: Path, texts: dict[str, list[str]], model: str, gate: str, tokens: int) -> dict[str, Any]:
    entries = []
    for name, documents in texts.items():
        folder = root / name
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for i, text in enumerate(documents):
                (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
        prompts = [text[:250] for text in split(documents)[0][:6]]
        entries.append({"model": model, "name": name, "texts": [str(folder)], "prompts": prompts})
    kept = {} if gate == "prefix" else {"statistics": str(root / "statistics")}
    return {"base_model": model, "experts": entries, "gate": gate, "calibration_tokens": tokens, **kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=3072, help="calibration tokens a domain")
    parser.add_argument("--held-out", type=int, default=1024, help="judged tokens a domain")
    parser.add_argument("--keep", type=Path, help="keep the statistics in this folder, and take those already there")
    args = parser.parse_args()
    model, texts, rows = resolve_llm("smollm2").path, domain_texts(), {}
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        root, gates = args.keep or Path(temporary), {}
        for gate in GATES:
            start = time.process_time()
            work = plan(write_recipe(root, texts, model, gate, args.tokens))
            started = calibrate(work, root)
            gates[gate] = started.gates
            if work.room is not None and started.evidence is not None:
                wide = widened(trunk_model(work), work.room, started.evidence)
            rows[gate] = {"cpu_seconds": time.process_time() - start}
        trunk, tokenizer = trunk_model(work), tokenizer_of(Path(model))
        right = {gate: torch.zeros(len(work.mixed)) for gate in GATES}
        for number, documents in enumerate(texts.values()):
            ids = windows(split(documents)[1], tokenizer, WINDOW, args.held_out)
            for gate, weights in gates.items():
                model_of = wide if gate == "prefix" else trunk
                inputs = torch.cat([router_inputs(model_of, ids[i : i + 1]) for i in range(len(ids))], dim=1)
                chosen = torch.einsum("lnh,leh->lne", inputs, weights.float()).argmax(-1)
                right[gate] += (chosen == number).float().mean(1) / len(texts)
    for gate in GATES:
        rows[gate] |= {"accuracy": float(right[gate].mean()), "by_layer": [round(float(x), 4) for x in right[gate]]}
        print(f"{gate:11} {rows[gate]['accuracy']:.3f}  {rows[gate]['cpu_seconds']:.1f} CPU s", flush=True)
    report = {"machine": machine(), "tokens": args.tokens, "held_out": args.held_out, "gates": rows}
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
