"""The row `twin` of `language_bench.py`: four LoRA experts, routed by what was read so far.

No token is scored with a router that has seen it: in each window the shared model alone reads the first tokens, and the
rest is scored with the weights that those first tokens gave. The router is trained on the validation texts (four fifths
of each; its step is chosen on the last fifth); no coefficient is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import model_fusion as mf
from language_texts import DOMAINS

PROMPT, WINDOW = 32, 512
"""Tokens that the router reads, and tokens of a window, as in `evaluate.language.perplexity`."""
SCALE, RANK = 0.3, 0.1


def recipe(experts: Mapping[str, str], texts: Mapping[str, Path]) -> dict[str, Any]:
    return {
        "shared": {"base": "smollm2", "lambda": SCALE},
        "experts": [{"model": experts[name], "name": name, "texts": [str(texts[name])]} for name in DOMAINS],
        "rank": RANK,
        "router": {"window": PROMPT},
        "dtype": "bfloat16",
    }


@torch.inference_mode()
def nats(twin: Any, tokenizer: Any, text: str) -> tuple[float, list[list[float]]]:
    """(mean nats a token, the weights of each window); the first token of a window is not scored."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    total, count, weights = 0.0, 0, []
    for piece in torch.split(ids, WINDOW, dim=1):
        if piece.shape[1] < 2:
            continue
        start = piece[:, :PROMPT]
        plain = torch.zeros(1, len(DOMAINS))
        total += scored(twin(input_ids=start, expert_weights=plain, use_cache=False).logits[0], start[0], 1)
        if piece.shape[1] > PROMPT:
            found = twin.route(start)
            weights.append(found[0].tolist())
            total += scored(twin(input_ids=piece, expert_weights=found, use_cache=False).logits[0], piece[0], PROMPT)
        count += piece.shape[1] - 1
    return total / count, weights


def scored(logits: Tensor, ids: Tensor, first: int) -> float:
    """Summed nats of the tokens from number `first` on."""
    return float(cross_entropy(logits[first - 1 : -1].float(), ids[first:], reduction="sum"))


def measure(experts: Mapping[str, str], texts: Mapping[str, Path], held: Mapping[str, str], folder: Path) -> Any:
    """Nats on each test text; bytes of shared model, parts and router; the router's own accuracy."""
    cpu = time.process_time()
    made = mf.twin(recipe(experts, texts), folder, progress=False)
    from transformers import AutoTokenizer

    twin, tokenizer = mf.TwinForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = {name: nats(twin, tokenizer, text) for name, text in held.items()}
    right = [max(range(len(w)), key=w.__getitem__) == DOMAINS.index(n) for n, (_, ws) in found.items() for w in ws]
    return {
        "nats": {name: value for name, (value, _) in found.items()},
        "bytes": sum(made.bytes.values()),
        "parts": made.bytes,
        "setting": {"lambda": SCALE, "rank": RANK},
        "router": {"validation": made.router_accuracy, "test windows": sum(right) / len(right), "of": len(right)},
        "cpu": time.process_time() - cpu,
    }
