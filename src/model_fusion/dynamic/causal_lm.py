"""Twin-Merging as a transformers causal LM: the experts' weights are found from the prompt and kept for decoding.

Importing this module registers the class, so that `AutoModelForCausalLM` opens a saved twin. It is no stock
architecture: only this package runs it. `merged` gives an ordinary model of one input.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model_fusion.architecture.wrapped import WrappedConfig, kernels_kept
from model_fusion.dynamic import MODEL_TYPE
from model_fusion.dynamic.parts import Parts
from model_fusion.dynamic.twin import TwinModel
from model_fusion.errors import InputError


class TwinConfig(WrappedConfig):
    """`text_config` is the shared model's config; `experts` their names in the order of the weights. `built` says how
    the twin was made; `files` has the SHA-256 of every other file."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        text_config: Any = None,
        experts: Sequence[str] = (),
        built: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.experts, self.built, self.files = list(experts), dict(built or {}), dict(files or {})
        super().__init__(text_config, **options)


@dataclass
class TwinOutput(CausalLMOutputWithPast):
    """Also the weights that were used, float32 [B, T]."""

    expert_weights: Tensor | None = None


def mean_hidden(base: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """float [B, d]: the mean over real tokens of the last hidden state. Rows may be padded on either side."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    decoder = base.base_model
    options: dict[str, Any] = {"use_cache": False}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        options["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    hidden = decoder(input_ids=input_ids, attention_mask=mask, **options).last_hidden_state
    # where, not a product: what stands at padding may be anything
    kept = torch.where(mask[..., None].bool(), hidden, torch.zeros((), dtype=hidden.dtype, device=hidden.device))
    return kept.float().sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class TwinForCausalLM(PreTrainedModel, GenerationMixin):
    """`forward` and `generate` as the shared model's, with `expert_weights` [B, T] beside.

    Without them they come from the router on the tokens given: in `generate` from the prompt alone, before the first
    new token, then kept. A caller with its own decoding loop need not pass them on: the KV cache carries them.
    To judge a text, give the weights of its beginning (`route`): a router that reads the whole text knows its ending.
    """

    config_class = TwinConfig
    main_input_name = "input_ids"
    base_model_prefix = "base"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(
        self, shared: Any, parts: Parts, router: nn.Module | None, experts: Sequence[str], built: Any = None
    ) -> None:
        with kernels_kept(shared.config) as kernels:
            super().__init__(TwinConfig(shared.config, experts, built, **kernels))
        self.twin = TwinModel(shared.requires_grad_(False), parts, router, self._features)
        if self.twin.experts != len(experts):
            raise InputError(f"{len(experts)} experts are named, the parts are of {self.twin.experts}")
        self.generation_config = copy.deepcopy(shared.generation_config)
        self._named = frozenset(inspect.signature(shared.forward).parameters)

    @property
    def shared(self) -> Any:
        """The shared model θ*, an ordinary causal LM."""
        return self.twin.shared

    def _features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return mean_hidden(self.shared, input_ids, attention_mask)

    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Each row's weights over the experts, float32 [B, T]."""
        return self.twin.route(input_ids, attention_mask)

    def bytes(self) -> dict[str, int]:
        """Bytes of shared model, exclusive parts and router."""
        return self.twin.bytes()

    def merged(self, weights: Tensor) -> dict[str, Tensor]:
        """The state dict of the shared model's class for one row of weights [T]."""
        return self.twin.merged(weights)

    def get_input_embeddings(self) -> Any:
        return self.shared.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.shared.get_output_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        expert_weights: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> TwinOutput:
        """As the shared model's forward; `labels` give its loss. Raises InputError where a cache has no weights."""
        weights = expert_weights
        if weights is None and past_key_values is not None and past_key_values.get_seq_length():
            weights = getattr(past_key_values, "expert_weights", None)
            if weights is None:
                raise InputError("this KV cache was not filled by a twin: give expert_weights=model.route(prompt)")
        if weights is None:
            if input_ids is None:
                raise InputError("the router reads input_ids: give them, or expert_weights")
            weights = self.route(input_ids, attention_mask)
        named = {"position_ids": position_ids, "logits_to_keep": logits_to_keep, "past_key_values": past_key_values}
        options |= {key: value for key, value in named.items() if key in self._named and value is not None}
        with self.twin.weighted(weights):
            out = self.shared(input_ids=input_ids, attention_mask=attention_mask, **{**options, "return_dict": True})
        if out.past_key_values is not None:
            out.past_key_values.expert_weights = weights
        return TwinOutput(**out, expert_weights=weights)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **options: Any) -> Any:
        """As transformers' `generate`; the weights come from the prompt unless `expert_weights` [B, T] are given."""
        ids = inputs if inputs is not None else options.get("input_ids")
        if options.get("expert_weights") is None:
            if ids is None:
                raise InputError("the router reads input_ids: give them, or expert_weights")
            options["expert_weights"] = self.route(ids, options.get("attention_mask"))
        return super().generate(inputs, **options)

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:
        """Write the twin's folder, complete or not at all; see `model_fusion.dynamic.saving`."""
        from model_fusion.dynamic.saving import save_twin

        save_twin(self, Path(save_directory))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *model_args: Any, config: Any = None, **options: Any) -> Any:
        """Load what `save_pretrained` or `model-fusion dynamic twin` wrote; `dtype` and `attn_implementation` as
        transformers takes them."""
        from model_fusion.dynamic.saving import load_twin

        kept = {key: options[key] for key in ("dtype", "attn_implementation") if options.get(key) is not None}
        return load_twin(Path(folder), **kept)


AutoConfig.register(MODEL_TYPE, TwinConfig, exist_ok=True)
AutoModelForCausalLM.register(TwinConfig, TwinForCausalLM, exist_ok=True)
