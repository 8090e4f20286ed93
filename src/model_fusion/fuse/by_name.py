"""Modules by an expert's name, which may be any: torch's own dictionary refuses `items`, `values`, `type` …"""

from __future__ import annotations

from torch import nn


class ByName(nn.ModuleDict):
    """A `ModuleDict` whose keys may be names of its own methods; read them with `[name]`."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]
