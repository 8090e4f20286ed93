"""The fused model's configuration: the base's own config inside."""

from __future__ import annotations

from typing import Any

from model_fusion.architecture.wrapped import WrappedConfig


class FusedConfig(WrappedConfig):
    """`text_config` is the base LLM's config."""

    model_type = "model_fusion"

    def __init__(self, text_config: Any = None, **kwargs: Any) -> None:
        super().__init__(text_config, **kwargs)
