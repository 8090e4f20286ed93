"""The fused model: a frozen (or LoRA-adapted) causal LM that reads experts through a bridge and answers in words."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from model_fusion.architecture.wrapped import kernels_kept
from model_fusion.checkpoint.llm import DEFAULT_LLM, LLMSource, load_llm, resolve_llm
from model_fusion.errors import InputError
from model_fusion.fuse.bridge_set import BridgeSet
from model_fusion.fuse.bridges import BridgeConfig, Signal
from model_fusion.fuse.config import FusedConfig
from model_fusion.fuse.experts.base import Expert
from model_fusion.fuse.placeholders import check_names, reserve_ids
from model_fusion.fuse.precision import fastest_dtype
from model_fusion.fuse.processor import FusedProcessor, Messages
from model_fusion.fuse.wire import Wire, started

if TYPE_CHECKING:
    from model_fusion.training.loop import History


GIVEN = "given"
"""Name of a base LLM that was handed in loaded and does not say where it came from."""


class FusedModel(BridgeSet, PreTrainedModel, GenerationMixin):
    """`forward(input_ids, attention_mask, labels, expert_features, expert_mask, expert_index)`; `generate` as usual.

    Build with `FusedModel.build`, train with `fit` (or any Trainer), ask with `answer` or `generate`.
    """

    config_class = FusedConfig
    main_input_name = "input_ids"
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(
        self,
        base: Any,
        tokenizer: Any,
        experts: Mapping[str, Expert],
        source: LLMSource,
        *,
        reserved: Mapping[str, int] | None = None,
    ) -> None:
        with kernels_kept(base.config) as kernels:
            super().__init__(FusedConfig(text_config=base.config, **kernels))
        self.base = base.requires_grad_(False).eval()
        self.generation_config = copy.deepcopy(base.generation_config)
        self.tokenizer, self.experts, self.source = tokenizer, dict(experts), source
        count = base.get_input_embeddings().weight.shape[0]
        self.reserved = dict(reserved or zip(experts, reserve_ids(tokenizer, count, len(experts)), strict=True))
        self.fusions = nn.ModuleDict()
        self.active = ""
        self.enabled = True
        self.wire = Wire(base)
        self.gradient_checkpointing = False
        self._base_arguments = frozenset(inspect.signature(base.forward).parameters)
        self.task: dict[str, Any] | None = None
        """What a saved fusion tells an audit: the task's `name`, its `options`, the `training` settings."""

    @classmethod
    def build(
        cls,
        base: str | Path | PreTrainedModel = DEFAULT_LLM,
        *,
        experts: Mapping[str, Expert],
        bridge: str | dict[str, Any] | BridgeConfig = "prefix",
        tokenizer: Any = None,
        dtype: torch.dtype | str = "auto",
        seed: int = 0,
        **options: Any,
    ) -> FusedModel:
        """A fused model with a fresh bridge. `base`: an embedded name, hub id, folder, GGUF file, or a loaded
        model (then with its `tokenizer`). dtype "auto" measures float32 against bfloat16 on the CPU and takes the
        faster. `options` (`device_map`, `quantization_config` …) go to transformers. Raises InputError."""
        if not experts:
            raise InputError("no expert was given: a fusion needs at least one")
        check_names(experts)
        if isinstance(base, (str, Path)):
            source = resolve_llm(base)
            on_cpu = "device_map" not in options and "quantization_config" not in options
            chosen = fastest_dtype() if dtype == "auto" and on_cpu else dtype
            base, tokenizer = load_llm(source, dtype=chosen, **options)
        else:
            if tokenizer is None:
                raise InputError("a loaded base model needs its tokenizer: build(model, tokenizer=…)")
            source = LLMSource(str(getattr(base.config, "_name_or_path", "") or GIVEN), "", "")
        check_names(experts, tokenizer)
        fused = cls(base, tokenizer, experts, source)
        fused.add_bridge("default", bridge, seed=seed)
        fused.eval()
        return fused

    @property
    def processor(self) -> FusedProcessor:
        return FusedProcessor(self.tokenizer, self.experts, self.bridge, self.reserved)

    def with_experts(self, experts: Mapping[str, Expert]) -> FusedModel:
        """The same trained bridge and normaliser reading other experts; nothing is retrained or copied."""
        for name, expert in experts.items():
            if name not in self.experts:
                raise InputError(f"unknown expert {name!r}; this fusion has {', '.join(self.experts)}")
            if tuple(expert.feature_shape) != tuple(self.experts[name].feature_shape):
                raise InputError(
                    f"expert {name!r} has features {list(expert.feature_shape)}, "
                    f"the bridge was made for {list(self.experts[name].feature_shape)}"
                )
        other = copy.copy(self)
        other.experts = {**self.experts, **experts}
        return other

    def fit(self, examples: Sequence[Any], **settings: Any) -> History:
        """Train the active bridge: see `model_fusion.fuse.fit.fit` for the arguments."""
        from model_fusion.fuse.fit import fit

        return fit(self, examples, **settings)

    def collator(self, examples: Sequence[Any]) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
        """A `data_collator` for somebody else's training loop: see `model_fusion.fuse.fit.collator`."""
        from model_fusion.fuse.fit import collator

        return collator(self, examples)

    def align(self, items: Sequence[Any], **options: Any) -> History:
        """Train the active bridge without labels: see `model_fusion.fuse.align.align` for the arguments."""
        from model_fusion.fuse.align import align

        return align(self, items, **options)

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:
        """Write bridge, normalisers and experts; the base by reference and hash. The options that Trainer passes
        (`state_dict`, `is_main_process` …) do not apply."""
        from model_fusion.fuse.saving import save_fused

        save_fused(self, save_directory)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> FusedModel:
        """Load what `save_pretrained` wrote: see `model_fusion.fuse.saving.load_fused` for the options."""
        from model_fusion.fuse.saving import load_fused

        return load_fused(folder, **options)

    # ---- the forward pass ----------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        expert_features: Tensor | None = None,
        expert_mask: Tensor | None = None,
        expert_index: Tensor | None = None,
        expert_active: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (and the loss over `labels`, -100 ignored) for a batch of B rows of Q ids.

        expert_features float32 [B, O, T, D] un-normalised, expert_mask bool [B, O, T], expert_index int64 [B, O]
        (which expert, -1 for none): as the processor makes them. expert_active bool [B, Q, O]: which occurrences
        stand at or before each position; derived from `input_ids` when absent.
        """
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        # Named in the signature, so that generate() counts positions from the first real id of a left-padded row,
        # and asks for the logits of the last position only.
        named = {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        kwargs |= {key: value for key, value in named.items() if key in self._base_arguments and value is not None}
        if self.gradient_checkpointing and torch.is_grad_enabled():
            if past_key_values is not None:
                raise InputError("gradient checkpointing cannot read a KV cache: train without past_key_values")
            kwargs["use_cache"] = False
        signal, rows = self._signal(input_ids, expert_features, expert_mask, expert_index, expert_active, kwargs)
        self.bridge.hear(signal)
        with self.wire.send(self.bridge if signal is not None else None, signal, rows):
            out = self.base(input_ids=input_ids, attention_mask=attention_mask, **{**kwargs, "return_dict": True})
        loss = None if labels is None else answer_loss(out.logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def _signal(
        self,
        ids: Tensor | None,
        features: Tensor | None,
        mask: Tensor | None,
        index: Tensor | None,
        active: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> tuple[Signal | None, list[tuple[Tensor, Tensor]]]:
        if features is None or not self.enabled:
            return None, []
        if ids is None or index is None or mask is None:
            raise InputError(
                "expert_features need input_ids, expert_mask and expert_index, as the processor makes them"
            )
        values = torch.zeros_like(features, dtype=torch.float32)
        for number, (name, expert) in enumerate(self.experts.items()):
            d = expert.feature_shape[1]
            normalised = torch.zeros_like(values)
            normalised[..., :d] = self.normalisers[name](features[..., :d])
            mine = (index == number)[..., None, None] & mask[..., None]
            values = torch.where(mine, normalised, values)
        if active is None:
            past = kwargs.get("past_key_values")
            active = self._active(ids, index)
            if past is not None and past.get_seq_length() and not self._is_placeholder(ids).any():
                active = (index >= 0)[:, None].expand(-1, ids.shape[1], -1)
        return Signal(values, mask, index, active), self._rows(ids, values, mask, index)

    def _rows(self, ids: Tensor, values: Tensor, mask: Tensor, index: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the embedding's output is overwritten with: for each expert, where, and the rows in reading order."""
        rows = []
        for number, (name, expert) in enumerate(self.experts.items()):
            where, mine = ids == self.reserved[name], index == number
            if not where.any():
                continue
            found, expected = where.sum(1), mine.sum(1) * self.bridge.slots(name)
            if not torch.equal(found, expected):
                row = int((found != expected).nonzero()[0])
                raise InputError(
                    f"row {row} has {int(found[row])} reserved ids for expert {name!r} but features for "
                    f"{int(expected[row])}: build the inputs with the model's processor"
                )
            t, d = expert.feature_shape
            rows.append((where, self.bridge.embed(name, values[mine][:, :t, :d], mask[mine][:, :t])))
        return rows

    def _active(self, ids: Tensor, index: Tensor) -> Tensor:
        return started(ids, index, list(self.reserved.values()), [self.bridge.slots(name) for name in self.experts])

    def _is_placeholder(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, torch.tensor(list(self.reserved.values()), device=ids.device))

    # ---- generation ----------------------------------------------------------------------------------------

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Adds which occurrences are active at the positions being computed, from the whole row's ids."""
        model_inputs: dict[str, Any] = self.base.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        index = kwargs.get("expert_index")
        if index is not None:
            width = model_inputs["input_ids"].shape[1]
            model_inputs["expert_active"] = self._active(input_ids, index)[:, -width:]
        return model_inputs

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        found: LogitsProcessorList = super()._get_logits_processor(generation_config, *args, **kwargs)
        if self.enabled:  # a reserved id has a meaning only in a prompt
            found.append(SuppressTokensLogitsProcessor(list(self.reserved.values()), device=self.device))
        return found

    @overload
    def answer(self, prompts: str, inputs: Mapping[str, Any] | None = None, **options: Any) -> str: ...
    @overload
    def answer(
        self, prompts: Sequence[str | Messages], inputs: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> list[str]: ...
    @torch.no_grad()
    def answer(self, prompts: Any, inputs: Any = None, *, max_new_tokens: int = 16, batch_size: int = 64,
               **options: Any) -> str | list[str]:  # fmt: skip
        """The answer to one prompt with its inputs by expert's name, or a list of answers to a list of prompts (texts
        or conversations) with a list of inputs. Greedy unless `options` (as `generate` takes them) say otherwise."""
        from model_fusion.fuse.answer import answer

        if isinstance(prompts, str):
            if isinstance(inputs, Sequence):
                raise InputError("one prompt takes one mapping of inputs: give a list of prompts, or no list of inputs")
            given = None if inputs is None else [inputs]
            return answer(self, [prompts], given, max_new_tokens=max_new_tokens, batch_size=1, **options)[0]
        if isinstance(inputs, Mapping):
            raise InputError("a list of prompts takes a list of inputs, one mapping for each prompt")
        return answer(self, prompts, inputs, max_new_tokens=max_new_tokens, batch_size=batch_size, **options)

    @property
    def context(self) -> int | None:
        """How many tokens, prompt and answer together, the LLM was made to read; None where it does not say."""
        found: int | None = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return found

    # ---- what PreTrainedModel asks for ---------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        module: nn.Module = self.base.get_input_embeddings()
        return module

    def get_output_embeddings(self) -> nn.Module:
        module: nn.Module = self.base.get_output_embeddings()
        return module

    @property
    def base_model(self) -> Callable[..., BaseModelOutputWithPast]:
        """The LLM below its head, with the bridge acting: `forward`'s arguments to the last hidden state [B, Q, H].
        Trainers that apply the head themselves (TRL's) call it."""

        def backbone(*args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
            out = FusedModel.forward(self, *args, **{**kwargs, "output_hidden_states": True, "logits_to_keep": 1})
            return BaseModelOutputWithPast(out.hidden_states[-1], out.past_key_values)

        return backbone

    def train(self, mode: bool = True) -> FusedModel:
        """The base stays in eval mode (GPT-2 has dropout); only the bridge follows `mode`."""
        super().train(mode)
        self.base.eval()
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1, **options: Any
    ) -> None:
        """As in transformers, but it acts while the frozen base is in eval mode; `use_reentrant` must be False."""
        settings = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if settings["use_reentrant"] or any(options.values()):
            raise InputError("gradient checkpointing of a fused model: use_reentrant=False and no offload")
        self.wire.recompute(every_n_layers, settings)
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """As in transformers."""
        self.wire.recompute(0, {})
        self.gradient_checkpointing = False


def answer_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy of the next token over labels that are not -100; with `items`, their sum over it.

    logits [B, Q, V], labels int64 [B, Q]. Only labelled positions are turned to float32."""
    shifted = labels[:, 1:].to(logits.device)
    keep = shifted != -100
    if not keep.any():
        raise InputError("a batch without any answer token: give every training example an answer")
    loss = nn.functional.cross_entropy(
        logits[:, :-1][keep].float(), shifted[keep], reduction="sum" if items is not None else "mean"
    )
    return loss / items if items is not None else loss
