"""`lora` (LoRA fusion): features become tokens, and LoRA on the attention projections (through peft) adapts the
LLM to read them.

The adapter acts from the placeholder on. Before it, and in rows without an expert, the LLM is exactly the base.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model_fusion.errors import InputError, IntegrityError, MissingDependencyError
from model_fusion.fuse.bridges.base import Bridge, BridgeConfig, LLMShape, Signal, flat
from model_fusion.fuse.bridges.prefix import SoftTokens
from model_fusion.fuse.by_name import ByName

ATTENTION = re.compile(r"(?:^|\.)(q_proj|k_proj|v_proj|o_proj|c_attn|qkv_proj|query_key_value)$")


@dataclass(frozen=True)
class Lora(BridgeConfig):
    """`tokens` soft tokens and rank-`rank` LoRA (scale alpha / rank) on the attention projections `targets`
    (empty: the query and value projections, or the joint one where they are stored as one). `codes`: see
    `SoftTokens`."""

    kind: ClassVar[str] = "lora"
    training: ClassVar[Mapping[str, Any]] = {"batch_size": 8, "learning_rate": 5e-3, "target": (1.0, 0.02)}
    tokens: int = 4
    width: int = 256
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    codes: int = 0

    def build(self, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> LoraBridge:
        if self.rank < 1 or self.tokens < 1:
            raise InputError(f"lora: rank and tokens must be at least 1, got {self.rank} and {self.tokens}")
        return LoraBridge(self, base, experts)


class LoraBridge(Bridge):
    kind = "lora"
    frozen_prompt = True

    def __init__(self, config: Lora, base: LLMShape, experts: Mapping[str, tuple[int, int]]) -> None:
        super().__init__(base, experts)
        self.config = config
        self.adapter = ""
        self._acts: Tensor | None = None
        self.takes_space = config.codes > 0
        self.soft = ByName(
            {
                name: SoftTokens(t * d, config.tokens, config.width, base, config.codes)
                for name, (t, d) in experts.items()
            }
        )

    def slots(self, expert: str) -> int:
        return self.config.tokens

    def embed(self, expert: str, values: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.soft[expert](flat(values, mask))
        return out

    def start_at(self, expert: str, rows: Tensor) -> list[nn.Parameter]:
        soft = self.soft[expert]
        assert isinstance(soft, SoftTokens)
        return soft.start_at(rows)

    def attach(self, model: nn.Module, name: str) -> None:
        self.adapter = name
        with warnings.catch_warnings():
            # Several bridges on one base are what the fused model is made for; it switches between them itself.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            _peft().inject_adapter_in_model(self._peft_config(model), model, adapter_name=name)
        # peft makes an adapter in the base's dtype: bridges train in float32.
        for parameter in self._inside(model).values():
            parameter.data = parameter.data.float()
        for layer in _lora_layers(model):
            if name in layer.lora_B:
                layer.lora_B[name].register_forward_hook(self._from_the_placeholder)

    def hear(self, signal: Signal | None) -> None:
        self._acts = None if signal is None else signal.active.any(dim=-1)

    def _from_the_placeholder(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The adapter's change [B, Q, H] where an expert's placeholder stands at or before the position, else 0."""
        if self._acts is None:
            return torch.zeros_like(output)
        here = self._acts[..., None].to(output.device)
        return torch.where(here, output, torch.zeros((), dtype=output.dtype, device=output.device))

    def detach(self, model: nn.Module, name: str) -> None:
        for layer in _lora_layers(model):
            if name in layer.lora_A:
                layer.delete_adapter(name)

    def set_enabled(self, model: nn.Module, name: str, enabled: bool) -> None:
        for layer in _lora_layers(model):
            if enabled and name in layer.lora_A:
                layer.set_adapter([name])
            layer.enable_adapters(enabled and name in layer.lora_A)
        for parameter in self._inside(model).values():
            parameter.requires_grad_(True)

    def trainable_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return [*self.parameters(), *self._inside(model).values()]

    def save_extra(self, model: nn.Module, name: str, folder: Path) -> list[str]:
        from safetensors.torch import save_file

        target = folder / "adapter"
        target.mkdir(parents=True, exist_ok=True)
        self._peft_config(model).save_pretrained(target)
        tensors = {key: p.detach().cpu().contiguous() for key, p in self._inside(model).items()}
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        return ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]

    def load_extra(self, model: nn.Module, name: str, folder: Path) -> None:
        from safetensors.torch import load_file

        stored, own = load_file(folder / "adapter" / "adapter_model.safetensors"), self._inside(model)
        if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in own.items()}:
            raise IntegrityError(f"{folder / 'adapter'}: the LoRA adapter does not fit this base LLM")
        for key, value in stored.items():
            own[key].data.copy_(value)

    def _inside(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """This adapter's parameters inside the LLM, under the names that peft's own files use."""
        return {
            "base_model.model." + key.replace(f".{self.adapter}.", "."): parameter
            for key, parameter in model.named_parameters()
            if "lora_" in key and f".{self.adapter}." in key
        }

    def _peft_config(self, model: nn.Module) -> Any:
        peft = _peft()
        targets = list(self.config.targets) or _default_targets(model)
        return peft.LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,
            target_modules=targets,
            fan_in_fan_out=any(t == "c_attn" for t in targets),
            task_type="CAUSAL_LM",
        )


def _default_targets(model: nn.Module) -> list[str]:
    found = {
        match.group(1)
        for name, _ in model.named_modules()
        if (match := ATTENTION.search(name.replace(".base_layer", "")))
    }
    separate = sorted(found & {"q_proj", "v_proj"})
    targets = separate or sorted(found - {"k_proj", "o_proj"})
    if not targets:
        raise InputError("lora: no attention projection found by name in this LLM; set `targets` in the bridge")
    return targets


def _lora_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise MissingDependencyError("the lora bridge needs peft: pip install 'model-fusion[fuse]'") from None
    return peft
