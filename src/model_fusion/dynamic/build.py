"""A twin put together: its router is trained on the shared model's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model_fusion.dynamic.causal_lm import TwinForCausalLM, mean_hidden
from model_fusion.dynamic.parts import Parts
from model_fusion.dynamic.router import SETTINGS, Labelled, Routed, train_router
from model_fusion.errors import InputError
from model_fusion.recipe.twin import RouterSpec
from model_fusion.training.texts import split, windows

Step = Callable[[], object]
BATCH = 16


@dataclass(frozen=True)
class Built:
    """A twin, and its router's share of right choices on the validation text."""

    twin: TwinForCausalLM
    validation: float


def build(
    shared: Any,
    tokenizer: Any,
    parts: Parts,
    texts: Mapping[str, Sequence[str]],
    spec: RouterSpec,
    *,
    seed: int = 0,
    built: Mapping[str, Any] | None = None,
    step: Callable[[int], object] = lambda total: None,
    progress: bool = True,
) -> Built:
    """Train the router on `texts` (expert's name → documents, in the parts' order) and put the twin together.

    Documents are split into training and validation; one document alone is cut at four fifths. `step` is called after
    each batch of features with their number. Raises InputError for too little text.
    """
    found = [_windows(name, documents, tokenizer, spec) for name, documents in texts.items()]
    total = sum(-(-len(ids) // BATCH) for pair in found for ids in pair)
    training, validation = (_features(shared, [pair[side] for pair in found], lambda: step(total)) for side in (0, 1))
    settings = replace(
        SETTINGS, steps=spec.steps, batch_size=spec.batch_size, learning_rate=spec.learning_rate, seed=seed
    )
    routed: Routed = train_router(
        training, validation, len(texts), settings=settings, dropout=spec.dropout, progress=progress
    )
    routed.router.soften(spec.temperature)
    twin = TwinForCausalLM(shared, parts, routed.router, list(texts), {**(built or {}), "router": _record(routed)})
    twin.eval()
    return Built(twin, routed.validation)


def _windows(name: str, documents: Sequence[str], tokenizer: Any, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    kept, out = split(list(documents))
    try:
        return windows(kept, tokenizer, spec.window, spec.tokens), windows(
            out, tokenizer, spec.window, max(spec.window, spec.tokens // 4)
        )
    except InputError as error:
        raise InputError(f"expert {name!r}: {error}, or lower router.window") from None


@torch.no_grad()
def _features(shared: Any, groups: Sequence[Tensor], step: Step) -> Labelled:
    rows = []
    for ids in groups:
        for batch in torch.split(ids, BATCH):
            rows.append(mean_hidden(shared, batch.to(shared.device)).cpu())
            step()
    labels = [torch.full((len(ids),), number) for number, ids in enumerate(groups)]
    return Labelled(torch.cat(rows), torch.cat(labels))


def _record(routed: Routed) -> dict[str, Any]:
    history = routed.history
    return {"validation_accuracy": routed.validation, "best_step": history.best_step, "steps": len(history.losses)}
