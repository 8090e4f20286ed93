"""A model of ours around causal LMs of transformers: its configuration, and what transformers resets on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, PretrainedConfig

KERNELS = ("_attn_implementation", "_experts_implementation")
"""What a config says of how attention and experts are computed."""


class WrappedConfig(PretrainedConfig):
    """`text_config` is the config of the LLM inside: generation asks it for layers, heads and the vocabulary.

    A subclass needs an `__init__` that calls this one: transformers writes another for a config without."""

    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(self, text_config: Any = None, **kwargs: Any) -> None:
        self.text_config = text_config
        super().__init__(**kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        inner = self.text_config
        return self if inner is None else inner.get_text_config(decoder=decoder, encoder=encoder)


@contextmanager
def kernels_kept(*configs: Any) -> Iterator[dict[str, Any]]:
    """Around `PreTrainedModel.__init__`, which resets the KERNELS of every config it holds: they are as before
    afterwards. Gives what the outer config is to be made with, the first config's."""
    before = [{key: getattr(config, key) for key in KERNELS if hasattr(config, key)} for config in configs]
    yield {"attn_implementation": before[0]["_attn_implementation"]}
    for config, kernels in zip(configs, before, strict=True):
        for key, value in kernels.items():
            setattr(config, key, value)
