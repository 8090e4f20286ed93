"""SmolLM2-135M with three FFN-LoRA experts: how long the build takes, and the verdict on the mixture.

python benchmarks/mix_smollm2.py --json out.json [--steps 15]

Each expert is a rank-16 LoRA on the FFNs, tuned for a few steps on one domain (Python code, C++ headers, docs).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from measure import machine
from mix_routing import domain_texts
from model_fusion.checkpoint.llm import resolve_llm
from model_fusion.mix.build import build
from model_fusion.mix.calibrate import tokenizer_of
from model_fusion.mix.verdict import evaluate
from model_fusion.training.texts import split, windows

WINDOW = 128


def tune(model: str, ids: torch.Tensor, folder: Path, steps: int, seed: int) -> list[float]:
    """A LoRA on gate, up and down of every layer, trained on random windows; its losses."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules=["gate_proj", "up_proj", "down_proj"])
    adapted: Any = get_peft_model(base, settings)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=2e-3), []
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (2,))]
        logits = adapted(input_ids=batch, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    adapted.save_pretrained(folder)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--judged", type=int, default=512, help="judged tokens a domain")
    args = parser.parse_args()
    logging.disable_progress_bar()
    model, report = resolve_llm("smollm2").path, {"machine": machine(), "steps": args.steps, "losses": {}}
    with tempfile.TemporaryDirectory() as temporary:
        root, entries, tokenizer = Path(temporary), [], tokenizer_of(Path(model))
        for seed, (name, documents) in enumerate(domain_texts().items()):
            (root / "texts" / name).mkdir(parents=True)
            for i, text in enumerate(documents):
                (root / "texts" / name / f"{i:03}.txt").write_text(text, encoding="utf-8")
            ids = windows(split(documents)[0], tokenizer, WINDOW, 20_000)
            report["losses"][name] = tune(model, ids, root / name, args.steps, seed)
            texts = [str(root / "texts" / name)]
            entries.append({"model": f"{model}+{root / name}", "name": name, "texts": texts})
        recipe = {"base_model": model, "experts": entries, "calibration_tokens": 1024}
        for gate in ("random", "ridge"):
            began, cpu = time.perf_counter(), time.process_time()
            out = build({**recipe, "gate": gate}, root / gate).folder
            report[f"build_{gate}"] = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        print({key: report[key] for key in ("build_random", "build_ridge")}, flush=True)
        report["verdict"] = evaluate(out, window=WINDOW, tokens=4 * args.judged).to_json()
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["verdict"], indent=1))


if __name__ == "__main__":
    main()
