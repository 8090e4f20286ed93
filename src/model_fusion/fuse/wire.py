"""How a bridge reaches into an LLM that it does not own: hooks on the embedding's output and on decoder layers.

No model's code is forked. The hooks act only while `Wire.send` holds a signal, which is the time of one forward
pass. Gradient checkpointing runs a layer's `forward` again, and the hooks are outside of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_fusion.errors import InputError
from model_fusion.fuse.bridges.base import Bridge, Signal


def decoder_layers(base: Any) -> nn.ModuleList:
    """The decoder's list of layers, of any transformers causal LM. Raises InputError when none is found."""
    count = base.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in base.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and name.rsplit(".", 1)[-1] in ("layers", "h", "blocks", "block")
        ):
            return module
    raise InputError(f"{type(base).__name__}: found no list of {count} decoder layers to attach a bridge to")


class Wire:
    """Owns the hooks of one base LLM and what the current forward pass sends through them."""

    def __init__(self, base: Any) -> None:
        self.layers = decoder_layers(base)
        self._bridge: Bridge | None = None
        self._signal: Signal | None = None
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._recomputed: list[tuple[nn.Module, Any]] = []
        base.get_input_embeddings().register_forward_hook(self._after_embedding)
        # A slice of positions is not contiguous, and linear() then copies the whole head once a row.
        base.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
        for number, layer in enumerate(self.layers):
            layer.register_forward_hook(self._after_layer(number))

    @contextmanager
    def send(self, bridge: Bridge | None, signal: Signal | None, rows: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """While inside: write `rows` (position mask bool [B, Q], values [n, H]) over the embedding's output, and
        let `bridge` change its layers' outputs."""
        self._bridge, self._signal, self._rows = bridge, signal, rows
        try:
            yield
        finally:
            self._bridge, self._signal, self._rows = None, None, []

    def recompute(self, every: int, settings: Mapping[str, Any]) -> None:
        """Run every `every`-th layer again in the backward pass instead of keeping its activations; 0: none.

        transformers' own switch acts only on layers in training mode, and there dropout would act too."""
        for layer, forward in self._recomputed:
            layer.forward = forward
        self._recomputed = [(layer, layer.forward) for layer in self.layers[::every]] if every else []
        for layer, forward in self._recomputed:
            layer.forward = partial(checkpoint, forward, **settings)

    def _after_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for where, values in self._rows:
            output = output.masked_scatter(where[..., None].to(output.device), values.to(output))
        return output

    def _after_layer(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._bridge is None or self._signal is None or number not in self._bridge.layers():
                return output
            # A decoder layer returns a tensor in transformers 5 and a tuple before.
            hidden = output[0] if isinstance(output, tuple) else output
            signal = self._signal
            if signal.values.device != hidden.device:
                signal = Signal(*(getattr(signal, f).to(hidden.device) for f in ("values", "mask", "index", "active")))
            changed = self._bridge.after_layer(number, hidden, signal)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook


def started(ids: Tensor, index: Tensor, reserved: list[int], slots: list[int]) -> Tensor:
    """bool [B, Q, O]: occurrence o of a row stands at or before position q.

    ids int64 [B, Q], index int64 [B, O]; expert e's placeholder is `slots[e]` times the id `reserved[e]`.
    """
    active = torch.zeros(*ids.shape, index.shape[1], dtype=torch.bool, device=ids.device)
    for number, (token, size) in enumerate(zip(reserved, slots, strict=True)):
        written = (ids == token).cumsum(dim=1)
        mine = index == number
        rank = mine.cumsum(dim=1) - 1
        active |= mine[:, None] & (written[..., None] > (rank * size)[:, None])
    return active
