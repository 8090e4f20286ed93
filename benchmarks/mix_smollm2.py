"""SmolLM2-135M with three FFN-LoRA experts: how long the build takes, and the verdict on the mixture.

python benchmarks/mix_smollm2.py --json out.json [--experts dialogue,code,prose] [--judged 1024] [--gates ridge,prefix]

The experts are the committed adapters of the language bench (rank 4 on the FFNs, 100 steps each; see
language_experts.py). Gates are calibrated and judged on text that no expert was trained on, by document.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging

from language_texts import DOMAINS
from measure import machine
from model_fusion.checkpoint.llm import resolve_llm
from model_fusion.mix.build import build
from model_fusion.mix.verdict import evaluate

DATA = Path(__file__).parent / "language_data"
DOCUMENT = 3000
WINDOW = 128


def documents(domain: str) -> list[str]:
    """The committed held-out texts of a domain in pieces of DOCUMENT characters."""
    whole = [(DATA / f"{domain}.{side}.txt").read_text(encoding="utf-8") for side in ("validation", "test")]
    return [text[i : i + DOCUMENT] for text in whole for i in range(0, len(text) - DOCUMENT // 2, DOCUMENT)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--experts", default=",".join(DOMAINS[:3]))
    parser.add_argument("--judged", type=int, default=1024, help="judged tokens a domain")
    parser.add_argument("--gates", default="ridge,prefix")
    args = parser.parse_args()
    logging.disable_progress_bar()
    names, report = args.experts.split(","), dict[str, Any](machine=machine(), judged=args.judged)
    resolve_llm("smollm2")  # unpacked once, before the clock runs
    with tempfile.TemporaryDirectory() as temporary:
        root, entries = Path(temporary), []
        for name in names:
            (root / "texts" / name).mkdir(parents=True)
            for i, text in enumerate(documents(name)):
                (root / "texts" / name / f"{i:03}.txt").write_text(text, encoding="utf-8")
            model = f"smollm2+{DATA / 'adapters' / name}"
            entries.append({"model": model, "name": name, "texts": [str(root / "texts" / name)]})
        recipe = {"base_model": "smollm2", "experts": entries, "calibration_tokens": 1024}
        report["verdict"] = {}
        for gate in ("random", *args.gates.split(",")):
            began, cpu = time.perf_counter(), time.process_time()
            out = build({**recipe, "gate": gate}, root / gate).folder
            report[f"build_{gate}"] = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
            print(gate, report[f"build_{gate}"], flush=True)
            if gate != "random":
                report["verdict"][gate] = evaluate(out, window=WINDOW, tokens=4 * args.judged).to_json()
                shown = {
                    key: report["verdict"][gate][key] for key in ("oracle", "soup", "gateless", "routed", "sentence")
                }
                print(gate, shown, flush=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
