"""The language part of an audit, on the fusion as saved: does it still speak, and what do its gates do."""

from __future__ import annotations

import time
from typing import Any

import torch

from model_fusion.evaluate.language import (
    ORDINARY_TEXT,
    UNRELATED_PROMPTS,
    beside,
    identical_without_expert,
    kl_by_prompt,
    next_turns,
    perplexity,
    perplexity_beside,
)
from model_fusion.evaluate.trials import Trials
from model_fusion.fuse.bridges.gated import GatedBridge
from model_fusion.fuse.model import FusedModel

SAMPLES = 6


def measure(trials: Trials) -> dict[str, Any]:
    """Divergence from the text oracle over the unrelated prompts with the expert present, perplexity with the
    bridge on and off and after a prompt with the expert, bit-identity without an expert, samples of next
    turns, gate values token by token."""
    start, busy, fused = time.perf_counter(), time.process_time(), trials.fused
    prompts = beside(UNRELATED_PROMPTS, trials.name)
    test = [trials.questions[i].inputs[trials.name] for i in trials.test]
    inputs = [{trials.name: test[number % len(test)]} for number in range(len(prompts))]
    by_prompt = kl_by_prompt(fused, prompts, inputs)
    on = perplexity(fused, fused.tokenizer, ORDINARY_TEXT)
    with fused.bridge_off():
        off = perplexity(fused, fused.tokenizer, ORDINARY_TEXT)
    beside_expert, told = perplexity_beside(fused, prompts[0], inputs[0], ORDINARY_TEXT)
    step = len(prompts) // SAMPLES
    example = trials.questions[trials.test[0]]
    answer = trials.ask(fused, [example])[0]
    return {
        "prompts": len(prompts),
        "kl_mean": float(torch.cat(by_prompt).mean()),
        "kl_by_prompt": [float(row.mean()) for row in by_prompt],
        "perplexity": {
            "bridge_on": on,
            "bridge_off": off,
            "beside_expert": beside_expert,
            "told_instead": told,
            "bytes": len(ORDINARY_TEXT.encode()),
        },
        "identical_without_expert": identical_without_expert(fused, UNRELATED_PROMPTS[:8]),
        "samples": next_turns(fused, trials.task.prompt, UNRELATED_PROMPTS[::step][:SAMPLES], inputs[::step][:SAMPLES]),
        "gates": {
            "about the task": gate_values(fused, example.prompt, dict(example.inputs), answer),
            "unrelated": gate_values(fused, prompts[0], inputs[0], trials.fused.answer(prompts[:1], inputs[:1])[0]),
        },
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
    }


@torch.no_grad()
def gate_values(fused: FusedModel, prompt: str, inputs: dict[str, Any], answer: str) -> list[dict[str, Any]]:
    """For each token of a prompt and its answer, the value of the gate at each layer, the largest over experts.
    Empty where the bridge has no gates that depend on the token."""
    bridge = fused.bridge
    if not isinstance(bridge, GatedBridge):
        return []
    rows = fused.processor.encode([prompt], [inputs], [answer])
    seen: dict[int, list[float]] = {}
    contributions = bridge.contributions

    def watched(layer: int, hidden: torch.Tensor, signal: Any) -> Any:
        change, values = contributions(layer, hidden, signal)
        seen[layer] = torch.stack(list(values.values())).amax(dim=0)[0].tolist()
        return change, values

    bridge.contributions = watched  # type: ignore[method-assign]
    try:
        batch = {key: value.to(fused.device) for key, value in fused.processor.collate(rows).items()}
        fused(**batch, use_cache=False)
    finally:
        del bridge.contributions
    tokens = [_spelt(fused, token) for token in rows[0].ids]
    return [
        {"token": token, "prompt": place < rows[0].prompt_length, "gate": {str(k): v[place] for k, v in seen.items()}}
        for place, token in enumerate(tokens)
    ]


def _spelt(fused: FusedModel, token: int) -> str:
    """A token as a reader knows it; an expert's reserved id as its placeholder."""
    names = {number: f"<|{name}|>" for name, number in fused.reserved.items()}
    return names.get(token) or str(fused.tokenizer.decode([token]))
