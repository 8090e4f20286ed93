"""Does training the router pay? A small byte-level Llama, three dissimilar domains, FFN experts on a frozen trunk.

python benchmarks/mix_router.py --json out.json [--seeds 0 1 2] [--keep FOLDER]

Per seed: train a dense model on all three domains, then only its FFNs on each one; mix; measure the forced-expert
oracle, soup, gateless and every way to start the routers; train the routers alone, from ridge gates (which read one
token) and from prefix gates (which read the text so far). Bits per byte, on files that neither training nor selection
saw.
The text is found on this machine: Python sources, C++ headers, prose of package documentation.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from measure import machine
from model_fusion.mix.build import build
from model_fusion.mix.calibrate import tokenizer_of
from model_fusion.mix.domains import Domains
from model_fusion.mix.load import load_mixed
from model_fusion.mix.train import RouterSettings, next_token_loss, train_router
from model_fusion.mix.verdict import judge
from model_fusion.training.texts import split, windows

WINDOW, BATCH = 128, 15
PROMPTS = 8
NAMES = ("python", "headers", "prose")
TRAINED, VALIDATED, TESTED = 200_000, 150, 300  # tokens a domain for the routers; windows a domain that judge
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
    sizes = range(2001, 100_000)
    return {name: [p for p in files if p.is_file() and p.stat().st_size in sizes] for name, files in found.items()}


def write_texts(folder: Path, count: int = 60, test: int = 20) -> dict[str, Path]:
    """texts/NAME: `count` files a domain, evenly taken, for training and selection; test/NAME: `test` others, which
    only the report reads. ASCII, cut at 20 kB, the same for every seed. Returns the folders of texts/."""
    result = {}
    for name, files in domain_files().items():
        chosen = files[:: max(1, len(files) // count)][:count]
        rest = [p for p in files if p not in set(chosen)]
        step = max(1, len(rest) // test)
        for part, taken in (("texts", chosen), ("test", rest[step // 2 :: step][:test])):
            if (folder / part / name).is_dir():
                continue  # a kept folder's models were trained on these
            (folder / part / name).mkdir(parents=True)
            for i, file in enumerate(taken):
                text = file.read_bytes()[:20_000].decode("ascii", errors="ignore")
                (folder / part / name / f"{i:03}.txt").write_text(text, encoding="ascii")
        result[name] = folder / "texts" / name
    return result


@dataclass(frozen=True)
class Data:
    """Windows [N, WINDOW] of each domain: what trains, what selects (held-out files of texts/), what is reported."""

    train: list[Tensor]
    validation: list[Tensor]
    test: list[Tensor]


def read_data(folder: Path, tokenizer: Any) -> Data:
    """The three parts of a folder of `write_texts`."""
    parts: list[list[Tensor]] = [[], [], []]
    for name in NAMES:
        kept, out = split([p.read_text() for p in sorted((folder / "texts" / name).iterdir())])
        test = [p.read_text() for p in sorted((folder / "test" / name).iterdir())]
        parts[0].append(windows(kept, tokenizer, WINDOW, TRAINED))
        parts[1].append(evenly(windows(out, tokenizer, WINDOW, 60_000), VALIDATED))
        parts[2].append(evenly(windows(test, tokenizer, WINDOW, 60_000), TESTED))
    return Data(*parts)


def evenly(rows: Tensor, count: int) -> Tensor:
    """`count` rows, evenly taken."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


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


def recipe(folders: list[Path], texts: dict[str, Path], gate: str, seed: int, top: int = 2) -> dict[str, Any]:
    """A mix of the experts whose gates start as `gate`; mergekit's gates get the start of eight training files."""
    entries = []
    for folder, path in zip(folders[1:], texts.values(), strict=True):
        files = split([p.read_text() for p in sorted(path.iterdir())])[0]
        prompts = [text[1000:1200] for text in files[:PROMPTS]]
        entries.append({"model": str(folder), "name": folder.name, "texts": [str(path)], "prompts": prompts})
    return {
        "base_model": str(folders[0]), "experts": entries, "gate": gate, "trunk": "require_equal", "seed": seed,
        "experts_per_token": top, "calibration_tokens": TRAINED,
    }  # fmt: skip


def one_seed(seed: int, root: Path, texts: dict[str, Path], base_steps: int, expert_steps: int) -> dict[str, Any]:
    work = root / f"seed{seed}"
    work.mkdir(exist_ok=True)
    began = time.process_time()
    folders = make_experts(work, texts, seed, base_steps, expert_steps)
    result: dict[str, Any] = {"seed": seed, "cpu_experts": time.process_time() - began, "top_2": {}}
    data = read_data(root, tokenizer_of(folders[0]))
    test = judged_by(data.test)
    for gate in ("random", "hidden", "hidden_avg", "mean", "ridge", "prefix"):
        out = build(recipe(folders, texts, gate, seed), work / gate, overwrite=True).folder
        model = load_mixed(out)
        if gate == "random":
            judged = judge(model, test)
            result |= {key: getattr(judged, key) for key in ("matrix", "oracle", "soup", "gateless", "headroom")}
        result["top_2"][gate] = bits_per_byte(model, test)
    result["trained"] = {
        f"{gate}, top {top}": trained(recipe(folders, texts, gate, seed, top), work / "trained", test, result)
        for gate, top in (("ridge", 3), ("prefix", 3), ("prefix", 2))
    }
    return result


def trained(recipe: dict[str, Any], out: Path, test: Domains, before: dict[str, Any]) -> dict[str, Any]:
    """The routers as built, and after training them alone; `recovered`: the share of the headroom."""
    began = time.process_time()
    build(recipe, out, overwrite=True)
    built = bits_per_byte(load_mixed(out), test)
    done = train_router(out, settings=ROUTER, progress=False)
    model = load_mixed(out)
    routed = bits_per_byte(model, test)
    seen = judge(model, judged_by([ids[:40] for ids in test.held_out.values()]))
    return {
        "built": built, "routed": routed, "accuracy": seen.accuracy, "load": seen.load, "mismatch": seen.mismatch,
        "parameters": done.parameters, "cpu": time.process_time() - began, "steps": len(done.history.losses),
        "recovered_built": (before["gateless"] - built) / before["headroom"],
        "recovered": (before["gateless"] - routed) / before["headroom"],
        "wins": {"gateless": before["gateless"] - routed} | {k: v - routed for k, v in before["top_2"].items()},
    }  # fmt: skip


def judged_by(windows_of: list[Tensor]) -> Domains:
    """Windows a domain as what a verdict reads; every token is a byte."""
    held = dict(zip(NAMES, windows_of, strict=True))
    return Domains(held, held, {name: ids[:, 1:].numel() for name, ids in held.items()})


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
        texts = write_texts(root)
        for seed in args.seeds:
            runs.append(one_seed(seed, root, texts, args.base_steps, args.expert_steps))
            report = {"machine": machine(), "runs": runs, "router": ROUTER.__dict__}
            args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
            row = runs[-1]
            line = {k: round(row[k], 3) for k in ("oracle", "soup", "gateless", "headroom")}
            print(seed, line | {gate: round(value, 3) for gate, value in row["top_2"].items()})
            for name, found in row["trained"].items():
                shares = f"recovered as built {found['recovered_built']:.3f}, trained {found['recovered']:.3f}"
                print(f"  {name}: {shares}", {k: round(v, 3) for k, v in found["wins"].items()}, flush=True)


if __name__ == "__main__":
    main()
