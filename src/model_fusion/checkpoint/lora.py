"""`base+lora`: a checkpoint whose tensors have a LoRA adapter added as they are read. No peft needed."""

import math
import re
from pathlib import Path

from torch import Tensor

from model_fusion.checkpoint.formats import Entry, read_header
from model_fusion.checkpoint.reader import Checkpoint, map_tensor, read_json
from model_fusion.checkpoint.sources import Source
from model_fusion.errors import InputError

_NAME = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight$")
_REFUSED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices")


class AdaptedCheckpoint(Checkpoint):
    """W + scale · B A, with scale = alpha / r (rsLoRA: alpha / sqrt(r)); Hu et al. 2021, equation 3."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        if source.adapter is None:
            raise InputError(f"{source.spec}: no adapter given")
        file = source.adapter / "adapter_config.json"
        if not file.is_file():
            raise InputError(f"{source.adapter}: no adapter_config.json; `base+lora` needs a peft LoRA folder")
        config = read_json(file)
        for key in _REFUSED:
            if config.get(key):
                raise InputError(f"{file}: {key} is not supported; merge the adapter with peft first")
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
            raise InputError(f"{file}: r and lora_alpha must be numbers, r at least 1")
        self._scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self._transpose = bool(config.get("fan_in_fan_out"))
        self._pairs: dict[str, dict[str, Entry]] = {}
        self._pair_up(source.adapter / "adapter_model.safetensors")

    def _pair_up(self, file: Path) -> None:
        if not file.is_file():
            raise InputError(f"{file}: the adapter's weights are missing")
        for entry in read_header(file):
            match = _NAME.match(entry.name)
            if match is None:
                raise InputError(f"{file}: tensor {entry.name!r} is not a LoRA matrix; merge with peft first")
            target = f"{match.group(1)}.weight"
            if target not in self:
                raise InputError(f"{file}: tensor {entry.name!r} has no counterpart {target!r} in {self.folder}")
            self._pairs.setdefault(target, {})[match.group(2)] = entry
        for target, pair in self._pairs.items():
            if set(pair) != {"A", "B"}:
                raise InputError(f"{file}: {target!r} has lora_{min(pair)} only; the pair is incomplete")
            shape = (pair["B"].shape[0], pair["A"].shape[-1])
            wanted = self.spec(target).shape
            if shape != (wanted[::-1] if self._transpose else wanted):
                raise InputError(f"{file}: LoRA of {target!r} is {shape}, the base's tensor {wanted}")

    @property
    def adapted(self) -> list[str]:
        """Names of the tensors that the adapter changes."""
        return list(self._pairs)

    def read(self, name: str) -> Tensor:
        """The tensor with its adapter, float32 where there is one (rounded only in the output)."""
        weight = super().read(name)
        pair = self._pairs.get(name)
        if pair is None:
            return weight
        delta = map_tensor(pair["B"]).float() @ map_tensor(pair["A"]).float()
        return weight.float().add(delta.T if self._transpose else delta, alpha=self._scale)
