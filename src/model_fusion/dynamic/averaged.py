"""Several causal LMs of one vocabulary that speak as one: the mean of their next-token probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model_fusion.architecture.wrapped import WrappedConfig, kernels_kept
from model_fusion.errors import InputError


class AveragedConfig(WrappedConfig):
    """`text_config` is the first member's."""

    model_type = "model_fusion_averaged"

    def __init__(self, text_config: Any = None, **kwargs: Any) -> None:
        super().__init__(text_config, **kwargs)


class Caches:
    """One key-value cache a member, moved together."""

    is_compileable = False

    def __init__(self, members: Iterable[Any]) -> None:
        self.each = [DynamicCache(config=member.config.get_text_config(decoder=True)) for member in members]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.each[0].get_seq_length(layer_idx))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for cache in self.each:
            cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for cache in self.each:
            cache.batch_repeat_interleave(repeats)

    def crop(self, max_length: int) -> None:
        for cache in self.each:
            cache.crop(max_length)


class AveragedModels(PreTrainedModel, GenerationMixin):
    """log Σ wᵢ pᵢ + c as logits, p softmaxes of the members' own logits, w positive and summing to one, and c what the
    first member's logits have beyond its log-probabilities, so that a penalty that reads logits acts as it does alone.

    `forward` and `generate` take what a causal LM takes. A member that stands alone, or equal members, give exactly
    that member's logits: the sum is taken relative to the largest term."""

    config_class = AveragedConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, members: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        if not members:
            raise InputError("an ensemble needs at least one model")
        shares = [1.0] * len(members) if weights is None else list(weights)
        if len(shares) != len(members) or min(shares) <= 0 or not all(map(math.isfinite, shares)):
            raise InputError(f"weights: give {len(members)} numbers above 0, one a model, got {shares}")
        sizes = {member.get_input_embeddings().weight.shape[0] for member in members}
        configs = [member.config for member in members]
        with kernels_kept(*configs) as kernels:
            super().__init__(AveragedConfig(text_config=configs[0], **kernels))
        self.members = nn.ModuleList(members)
        self.size = min(sizes)  # longer embeddings are padding
        self.register_buffer("shares", torch.tensor(shares, dtype=torch.float32), persistent=False)
        self.generation_config = members[0].generation_config
        self.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Caches | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        """Float32 logits [B, K, V], and the loss over `labels`, −100 ignored."""
        if use_cache and past_key_values is None:
            past_key_values = Caches(self.members)
        raw = []
        for number, member in enumerate(self.members):
            cache = None if past_key_values is None else past_key_values.each[number]
            out = member(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=logits_to_keep,
            )
            raw.append(out.logits[..., : self.size].float().to(self.shares.device))
        found = [one.log_softmax(-1) for one in raw]
        mean = mean_of(found, self.shares)
        # where nothing changed, the first member's own bits
        logits = torch.where(mean == found[0], raw[0], mean + raw[0].logsumexp(-1, keepdim=True))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device), ignore_index=-100
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = Caches(self.members)

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = next(iter(self.members)).get_input_embeddings()  # type: ignore[operator]
        return found


def mean_of(log_probs: Sequence[Tensor], shares: Tensor) -> Tensor:
    """log of the weighted mean of probabilities, from their logarithms (equal shapes) and weights [n].

    Equal inputs come back bit for bit."""
    stacked = torch.stack(list(log_probs))
    weights = shares.view(-1, *[1] * (stacked.dim() - 1)).to(stacked.dtype)
    top = stacked.amax(0)
    safe = torch.where(top.isinf(), torch.zeros_like(top), top)
    terms = weights * (stacked - safe).exp()
    return safe + (terms.sum(0) / weights.sum(0)).log()
