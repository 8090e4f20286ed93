"""Does training the router pay? A small byte-level Llama, three dissimilar domains, FFN experts on a frozen trunk.

python benchmarks/mix_router.py --json out.json [--seeds 0 1 2] [--keep FOLDER]

Per seed: train a dense model on all three domains, then only its FFNs on each one; mix; measure the forced-expert
oracle, soup, gateless and every way to start the routers; train the routers alone. Bits per byte, held-out files.
The text is found on this machine: Python sources, C++ headers, prose of package documentation.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from measure import machine
from model_fusion.mix.build import build
from model_fusion.mix.calibrate import tokenizer_of
from model_fusion.mix.domains import Domains, gather, prepare
from model_fusion.mix.load import load_mixed
from model_fusion.mix.train import RouterSettings, next_token_loss, train_router
from model_fusion.mix.verdict import judge
from model_fusion.training.texts import split, windows

WINDOW, BATCH = 128, 15
PROMPTS = 8
JUDGED = 48_000  # a quarter of it is judged
ROUTER = RouterSettings(window=WINDOW, steps=150, batch_size=12, learning_rate=3e-2, validate_every=50, patience=0,
                        tokens=200_000)  # fmt: skip


def domain_files() -> dict[str, list[Path]]:
    """Files of three dissimilar kinds, found where this Python keeps its own and its packages' files."""
    site, library = Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"])
    found = {
        "python": sorted(p for p in library.rglob("*.py") if "test" not in p.parts and "site-packages" not in p.parts),
        "headers": sorted(p for p in (site / "torch" / "include").rglob("*.h")),
        "prose": sorted(p for p in site.glob("*.dist-info/**/*") if p.name.startswith(("METADATA", "LICENSE"))),
    }
    return {name: [p for p in files if 2000 < p.stat().st_size < 100_000] for name, files in found.items()}


def write_texts(folder: Path, count: int = 60) -> dict[str, Path]:
    """`count` files a domain, evenly taken, ASCII only, cut at 20 kB; the same for every seed."""
    result = {}
    for name, files in domain_files().items():
        result[name] = folder / name
        result[name].mkdir(parents=True, exist_ok=True)
        step = max(1, len(files) // count)
        for i, file in enumerate(files[::step][:count]):
            text = file.read_bytes()[:20_000].decode("ascii", errors="ignore")
            (result[name] / f"{i:03}.txt").write_text(text, encoding="ascii")
    return result


def byte_tokenizer(folder: Path) -> None:
    """256 bytes, one token each."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def byte_windows(folder: Path, tokenizer: Any) -> torch.Tensor:
    """Training windows [N, WINDOW] of a domain."""
    return windows(split([p.read_text() for p in sorted(folder.iterdir())])[0], tokenizer, WINDOW)


def fit(model: LlamaForCausalLM, data: list[torch.Tensor], parameters: list[Any], steps: int, seed: int) -> None:
    """Plain next-byte training on the windows of `data`, domains alternating within a batch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        each = BATCH // len(data)
        ids = torch.cat([d[torch.randint(len(d), (each,), generator=generator)] for d in data])
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def make_experts(folder: Path, texts: dict[str, Path], seed: int, base_steps: int, expert_steps: int) -> list[Path]:
    """[base, one expert a domain]: the experts' FFNs trained on their domain alone, all else the base's.

    Models that an interrupted run left in a kept folder are taken as they are.
    """
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None)  # fmt: skip
    made = [folder / name for name in ("base", *texts)]
    made[0].mkdir(exist_ok=True)
    byte_tokenizer(made[0])
    tokenizer = tokenizer_of(made[0])
    data = {name: byte_windows(path, tokenizer) for name, path in texts.items()}
    if not (made[0] / "model.safetensors").is_file():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        fit(model, list(data.values()), list(model.parameters()), base_steps, seed)
        model.save_pretrained(made[0])
    for i, own in enumerate(data.values()):
        if (made[1 + i] / "model.safetensors").is_file():
            continue
        model = LlamaForCausalLM.from_pretrained(made[0])
        model.requires_grad_(False)
        ffn = [p for layer in model.model.layers for p in layer.mlp.parameters()]
        for p in ffn:
            p.requires_grad_(True)
        fit(model, [own], ffn, expert_steps, seed + 1 + i)
        model.save_pretrained(made[1 + i])
        byte_tokenizer(made[1 + i])
    return made


def recipe(folders: list[Path], texts: dict[str, Path], gate: str, seed: int) -> dict[str, Any]:
    """A mix of the experts whose gates start as `gate`; mergekit's gates get the start of eight training files."""
    entries = []
    for folder, path in zip(folders[1:], texts.values(), strict=True):
        files = split([p.read_text() for p in sorted(path.iterdir())])[0]
        prompts = [text[1000:1200] for text in files[:PROMPTS]]
        entries.append({"model": str(folder), "name": folder.name, "texts": [str(path)], "prompts": prompts})
    return {"base_model": str(folders[0]), "experts": entries, "gate": gate, "trunk": "require_equal", "seed": seed}


def one_seed(seed: int, work: Path, texts: dict[str, Path], base_steps: int, expert_steps: int) -> dict[str, Any]:
    began = time.process_time()
    folders = make_experts(work, texts, seed, base_steps, expert_steps)
    result: dict[str, Any] = {"seed": seed, "cpu_experts": time.process_time() - began, "top_2": {}}
    for gate in ("random", "hidden", "hidden_avg", "mean", "ridge"):
        out = build(recipe(folders, texts, gate, seed), work / gate, overwrite=True).folder
        model = load_mixed(out)
        domains = prepare(gather(out, None), tokenizer_of(out), WINDOW, JUDGED)
        if gate == "random":
            judged = judge(model, domains)
            result |= {key: getattr(judged, key) for key in ("matrix", "oracle", "soup", "gateless", "headroom")}
        result["top_2"][gate] = bits_per_byte(model, domains)
    began = time.process_time()
    out = build(
        {**recipe(folders, texts, "ridge", seed), "experts_per_token": 3}, work / "trained", overwrite=True
    ).folder
    trained = train_router(out, settings=ROUTER, progress=False)
    judged = judge(load_mixed(out), domains)
    result["trained"] = {
        "routed": judged.routed, "accuracy": judged.accuracy, "load": judged.load, "mismatch": judged.mismatch,
        "parameters": trained.parameters, "cpu": time.process_time() - began, "steps": len(trained.history.losses),
        "recovered": (judged.gateless - judged.routed) / judged.headroom, "sentence": judged.sentence,
    }  # fmt: skip
    lines = {"gateless": judged.gateless, "hidden": result["top_2"]["hidden"], "random": result["top_2"]["random"]}
    result["wins"] = {name: value - judged.routed for name, value in lines.items()}
    return result


def bits_per_byte(model: Any, domains: Domains) -> float:
    """Mean over domains, of the model as it routes; every token is a byte."""
    with torch.inference_mode():
        nats = [
            float(torch.cat([next_token_loss(model(input_ids=b).logits, b) for b in torch.split(ids, 16)]).mean())
            for ids in domains.held_out.values()
        ]
    return sum(nats) / len(nats) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="keep the models in this folder, and take those already there")
    parser.add_argument("--base-steps", type=int, default=200)
    parser.add_argument("--expert-steps", type=int, default=200)
    args = parser.parse_args()
    logging.disable_progress_bar()
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep or Path(temporary)
        texts = write_texts(root / "texts")
        for seed in args.seeds:
            work = root / f"seed{seed}"
            work.mkdir(exist_ok=True)
            runs.append(one_seed(seed, work, texts, args.base_steps, args.expert_steps))
            report = {"machine": machine(), "runs": runs, "router": ROUTER.__dict__}
            args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
            row = runs[-1]
            line = {k: round(row[k], 3) for k in ("oracle", "soup", "gateless", "headroom")}
            line |= {gate: round(value, 3) for gate, value in row["top_2"].items()}
            print(seed, line, "trained", round(row["trained"]["routed"], 3), row["wins"], flush=True)


if __name__ == "__main__":
    main()
