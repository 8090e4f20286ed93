"""Compute once what a frozen LLM computes identically for all training rows.

Two shares, both exact up to the arithmetic of the dtype, used together where a bridge allows both:
- the prompt before the first placeholder, equal in all rows: its keys and values are kept (`frozen_prompt`);
- the layers below the first one that the bridge changes: their output is kept for each distinct row of ids
  (`frozen_below`), and they are passed over.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.processor import Encoded


class Shortcut:
    """Logits at the answers of training rows, with the shared part computed once. Built for one set of rows."""

    def __init__(self, fused: FusedModel, rows: Sequence[Encoded]) -> None:
        self.fused = fused
        bridge = fused.bridge
        self.shared = (
            shared_prompt(rows, set(fused.reserved.values()))
            if bridge.frozen_prompt and not fused.gradient_checkpointing
            else 0
        )
        self.below = bridge.frozen_below
        self.keeps_logits = "logits_to_keep" in inspect.signature(fused.base.forward).parameters
        self._cache = self._prompt_cache(rows[0].ids[: self.shared]) if self.shared else None
        self._hidden: dict[tuple[int, ...], Tensor] = {}

    def logits(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Logits [b, K, V] and labels int64 [b, K] over the last K positions, which hold every answer."""
        fused = self.fused
        batch = {k: v.to(fused.device) for k, v in fused.processor.collate(rows, labels=True).items()}
        labels = batch.pop("labels")
        batch["input_ids"] = batch["input_ids"][:, self.shared :]
        keep = labels.shape[1] - min(row.prompt_length for row in rows) + 1
        extra: dict[str, Any] = {"logits_to_keep": keep} if self.keeps_logits else {}
        if self._cache is not None:
            extra |= {"past_key_values": expanded(self._cache, len(rows)), "use_cache": True}
        else:
            extra["use_cache"] = False
        stored = self._stored(rows) if self.below is not None else None
        with passed_over(fused.wire.layers, self.below or 0, stored) if stored is not None else nullcontext():
            logits = fused(**batch, **extra).logits
        return logits[:, -keep:], labels[:, -keep:]

    @torch.no_grad()
    def _prompt_cache(self, ids: Sequence[int]) -> Any:
        with self.fused.bridge_off():
            return self.fused.base(
                input_ids=torch.tensor([ids], device=self.fused.device), use_cache=True
            ).past_key_values

    def _stored(self, rows: Sequence[Encoded]) -> Tensor:
        """The output [b, Q, H] of layer `below` for each row, right-padded with zeros."""
        keys = [tuple(row.ids) for row in rows]
        for key in dict.fromkeys(keys):
            if key not in self._hidden:
                self._hidden[key] = self._compute(next(row for row in rows if tuple(row.ids) == key))
        return nn.utils.rnn.pad_sequence([self._hidden[key] for key in keys], batch_first=True)

    @torch.no_grad()
    def _compute(self, row: Encoded) -> Tensor:
        """[Q, H]: the hidden state that layer `below` returns, before the bridge changes it."""
        found: list[Tensor] = []

        def take(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        assert self.below is not None
        # Prepended: the wire's own hook on the same layer must not have changed the output yet.
        handle = self.fused.wire.layers[self.below].register_forward_hook(take, prepend=True)
        try:
            self.fused(**self.fused.processor.collate([row]), use_cache=False)
        finally:
            handle.remove()
        return found[0][0, self.shared :].clone()


def shared_prompt(rows: Sequence[Encoded], reserved: set[int]) -> int:
    """How many leading ids are equal in all rows and before every placeholder and answer."""
    length = min(row.prompt_length for row in rows) - 1
    first = rows[0].ids
    for row in rows:
        length = min(
            length,
            next(
                (i for i, token in enumerate(row.ids[:length]) if token in reserved or token != first[i]),
                length,
            ),
        )
    return length


def expanded(cache: Any, rows: int) -> Any:
    """A key-value cache of one row as one of `rows` rows, without copying; the original stays as it is."""
    out = copy.copy(cache)
    out.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in out.layers:
        layer.keys, layer.values = (x.expand(rows, -1, -1, -1) for x in (layer.keys, layer.values))
    return out


@contextmanager
def passed_over(layers: nn.ModuleList, last: int, hidden: Tensor) -> Iterator[None]:
    """While inside, layers 0 to `last` compute nothing: `last` returns `hidden`, those below their input."""
    originals = [layer.forward for layer in layers[: last + 1]]

    def unchanged(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return states

    def stored(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    for number, layer in enumerate(layers[: last + 1]):
        layer.forward = stored if number == last else unchanged
    try:
        yield
    finally:
        for layer, original in zip(layers[: last + 1], originals, strict=True):
            layer.forward = original
