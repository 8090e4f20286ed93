"""The bridges that one base LLM carries: added, switched, removed, off. One of them is active at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model_fusion.errors import InputError
from model_fusion.fuse.bridges import Bridge, BridgeConfig, LLMShape, bridge_config
from model_fusion.fuse.by_name import ByName
from model_fusion.fuse.experts.base import Expert
from model_fusion.fuse.normalise import Normaliser


class Fusion(nn.Module):
    """One bridge with the normalisers it was trained behind. Several can be held for one base."""

    def __init__(self, config: BridgeConfig, shape: LLMShape, experts: Mapping[str, Expert]) -> None:
        super().__init__()
        self.config = config
        sizes = {name: expert.feature_shape for name, expert in experts.items()}
        self.bridge: Bridge = config.build(shape, sizes)
        self.normalisers = ByName({name: Normaliser(d) for name, (_, d) in sizes.items()})


class BridgeSet:
    """What a fused model knows of its bridges. `fusions` holds them by name, `active` names the one that acts."""

    base: Any
    config: Any
    tokenizer: Any
    experts: dict[str, Expert]
    fusions: nn.ModuleDict
    active: str
    enabled: bool

    def add_bridge(self, name: str, bridge: str | dict[str, Any] | BridgeConfig, *, seed: int = 0) -> None:
        """Add a fresh bridge beside the others and switch to it."""
        if name in self.fusions:
            raise InputError(f"a bridge called {name!r} exists already; remove it first or choose another name")
        if not name or "." in name or hasattr(nn.ModuleDict, name):  # peft keeps adapters in a dictionary of its own
            raise InputError(f"a bridge cannot be called {name!r}: choose another name, without a full stop")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fusion = Fusion(bridge_config(bridge), self._shape(), self.experts)
            fusion.bridge.attach(self.base, name)
        fusion.to(self.base.get_input_embeddings().weight.device)
        self.fusions[name] = fusion
        self.set_bridge(name)

    def set_bridge(self, name: str) -> None:
        """Switch to the bridge called `name`."""
        chosen = self._fusion(name).bridge
        if self.active in self.fusions:
            self.bridge.set_enabled(self.base, self.active, False)
        self.active = name
        chosen.set_enabled(self.base, name, self.enabled)

    def remove_bridge(self, name: str) -> None:
        """Forget a bridge that is not the active one."""
        if name == self.active:
            raise InputError(f"bridge {name!r} is active: switch to another first")
        self._fusion(name).bridge.detach(self.base, name)
        del self.fusions[name]

    def load_bridge(self, name: str, folder: str | Path) -> None:
        """Add a bridge saved for the same experts and base as `name`, and switch to it."""
        from model_fusion.fuse.saving import load_bridge

        load_bridge(self, name, folder)  # type: ignore[arg-type]

    @contextmanager
    def bridge_off(self) -> Iterator[None]:
        """While inside, the LLM is the plain base: no hook acts, no adapter is on."""
        before, self.enabled = self.enabled, False
        self.bridge.set_enabled(self.base, self.active, False)
        try:
            yield
        finally:
            self.enabled = before
            self.bridge.set_enabled(self.base, self.active, before)

    @property
    def fusion(self) -> Fusion:
        """The active bridge with its config and normalisers."""
        return self._fusion(self.active)

    @property
    def bridge(self) -> Bridge:
        return self.fusion.bridge

    @property
    def normalisers(self) -> nn.ModuleDict:
        return self.fusion.normalisers

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The active bridge's parameters, adapters included. The base has none."""
        return self.bridge.trainable_parameters(self.base)

    def _fusion(self, name: str) -> Fusion:
        if name not in self.fusions:
            raise InputError(f"no bridge called {name!r}; loaded: {', '.join(self.fusions)}")
        fusion = self.fusions[name]
        assert isinstance(fusion, Fusion)
        return fusion

    def _shape(self) -> LLMShape:
        text = self.config.get_text_config()
        weight = self.base.get_input_embeddings().weight.detach()[: len(self.tokenizer)].float()
        # What the embedding module returns may be scaled (Gemma): measure its output, not its weights.
        # The largest row: that of a padding id may be zero.
        norms = weight.norm(dim=1)
        out = self.base.get_input_embeddings()(norms.argmax()[None, None]).detach().float().norm()
        scale = float(out / norms.max().clamp(min=1e-9))
        rms, mean = float(weight.pow(2).mean().sqrt()) * scale, weight.mean(0).cpu() * scale
        return LLMShape(text.hidden_size, text.num_hidden_layers, rms, mean)
