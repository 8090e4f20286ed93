"""Bridges: how an expert's features enter an LLM. One kind a file; this registry is the only list of them."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from model_fusion.errors import InputError
from model_fusion.fuse.bridges.base import Bridge, BridgeConfig, LLMShape, Signal
from model_fusion.fuse.bridges.cross_attention import CrossAttention
from model_fusion.fuse.bridges.gated import Gated
from model_fusion.fuse.bridges.lora import Lora
from model_fusion.fuse.bridges.prefix import Prefix
from model_fusion.fuse.bridges.untrained import Logit, Tool

REGISTRY: dict[str, type[BridgeConfig]] = {c.kind: c for c in (Prefix, Gated, Lora, CrossAttention, Logit, Tool)}


def bridge_config(settings: str | dict[str, Any] | BridgeConfig) -> BridgeConfig:
    """A bridge's config from its name, from a JSON object with `kind`, or as given. Raises InputError."""
    if isinstance(settings, BridgeConfig):
        return settings
    data = {"kind": settings} if isinstance(settings, str) else dict(settings)
    kind = data.pop("kind", None)
    if kind not in REGISTRY:
        near = difflib.get_close_matches(str(kind), REGISTRY, n=1)
        raise InputError(
            f"unknown bridge {kind!r}{f', did you mean {near[0]!r}' if near else ''}: one of {', '.join(REGISTRY)}"
        )
    known = {field.name for field in dataclasses.fields(REGISTRY[kind])}
    for key in data:
        if key not in known:
            raise InputError(f"bridge {kind}: unknown setting {key!r}; it has {', '.join(sorted(known)) or 'none'}")
    return REGISTRY[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


__all__ = [
    "REGISTRY",
    "Bridge",
    "BridgeConfig",
    "CrossAttention",
    "Gated",
    "LLMShape",
    "Logit",
    "Lora",
    "Prefix",
    "Signal",
    "Tool",
    "bridge_config",
]
