"""Trains the four LoRA experts of the language bench on SmolLM2-135M, one for each kind of text.

python benchmarks/language_experts.py --kjv kjv.txt [--out benchmarks/language_data/adapters] [--steps 100]

Rank 4 on the FFNs, bfloat16, a fixed seed; stored in peft's format (1.5 MB each). The committed adapters were made by
this command; floating-point sums differ between machines, so another machine's adapters differ in their last digits.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from language_texts import DOMAINS, training_text
from measure import machine
from model_fusion.checkpoint.llm import resolve_llm

WINDOW, BATCH, PEAK = 192, 4, 2e-3
TARGETS = ["gate_proj", "up_proj", "down_proj"]


def windows(documents: list[str], tokenizer: Any, seed: int) -> torch.Tensor:
    """int64 [n, WINDOW]: shuffled documents, joined by the end of text and cut."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[int] = []
    for number in order:
        ids += [*tokenizer(documents[number])["input_ids"], tokenizer.eos_token_id]
        if len(ids) > 500_000:
            break
    n = len(ids) // WINDOW
    return torch.tensor(ids[: n * WINDOW]).view(n, WINDOW)


def tune(domain: str, rows: torch.Tensor, folder: Path, steps: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    source = resolve_llm("smollm2")
    base = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16)
    adapted: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps, pct_start=0.1)
    order = torch.randperm(len(rows)).repeat(1 + steps * BATCH // len(rows))
    losses, began, cpu = [], time.perf_counter(), time.process_time()
    for step in range(steps):
        batch = rows[order[step * BATCH : (step + 1) * BATCH]]
        with torch.autocast("cpu", torch.bfloat16):
            logits = adapted(input_ids=batch, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].float().transpose(1, 2), batch[:, 1:])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 20 == 0:
            print(domain, step, round(losses[-1], 3), f"{time.perf_counter() - began:.0f} s", flush=True)
    adapted.peft_config["default"].base_model_name_or_path = "smollm2"
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return {"losses": losses, "cpu": time.process_time() - cpu, "seed": seed, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kjv", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "language_data" / "adapters")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--domains", default=",".join(DOMAINS))
    a = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(resolve_llm("smollm2").path)
    for domain in a.domains.split(","):
        seed = DOMAINS.index(domain)
        rows = windows(training_text(domain, a.kjv), tokenizer, seed)
        record = tune(domain, rows, a.out / domain, a.steps, seed)
        (a.out / domain / "training.json").write_text(json.dumps({"machine": machine(), **record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
