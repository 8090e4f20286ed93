"""The fused model's configuration: the base's own config inside, and what the fusion added."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


class FusedConfig(PretrainedConfig):
    """`text_config` is the base LLM's config: generation asks it for layers, heads and the vocabulary."""

    model_type = "model_fusion"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(self, text_config: Any = None, **kwargs: Any) -> None:
        self.text_config = text_config
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        return self.text_config if self.text_config is not None else self
