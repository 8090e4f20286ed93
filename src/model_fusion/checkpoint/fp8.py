"""FP8 checkpoints, dequantised as they are read: weight = stored · scale, in float32.

Three published layouts, told apart by the scale's shape: one number a tensor, one a row (fbgemm, compressed-tensors),
one a block (DeepSeek-V3's `weight_scale_inv`, 128 × 128). Only the weights are taken: scales of activations, which an
unquantised model has no use for, are left out.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model_fusion.checkpoint.formats import TensorSpec
from model_fusion.checkpoint.reader import QUANTISED, Checkpoint
from model_fusion.checkpoint.sources import Source
from model_fusion.errors import InputError

_SCALES = ("_scale_inv", "_scale")
_ACTIVATIONS = re.compile(r"\.(input_scale|input_scale_ub|output_scale|k_scale|v_scale|q_scale)$")


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the weights are FP8 with scales."""
    said: Mapping[str, Any] = next((config[key] for key in QUANTISED if isinstance(config.get(key), dict)), {})
    if said.get("quant_method") == "compressed-tensors":
        return said.get("format") == "float-quantized"
    return said.get("quant_method") in ("fp8", "fbgemm_fp8")


class Fp8Checkpoint(Checkpoint):
    """Answers as the same checkpoint in its config's dtype would. Raises `InputError` for a scale that is missing or
    does not fit."""

    _shown: dict[str, None] | None = None  # None until all is checked

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        said = next(self.config[key] for key in QUANTISED if self.config.get(key))
        self._block = said.get("weight_block_size")
        wanted = str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch.")
        self._dtype = getattr(torch, wanted) if wanted in ("float32", "float16") else torch.bfloat16
        self.config = {key: value for key, value in self.config.items() if key not in QUANTISED}
        stored = super().names
        self._scale_of: dict[str, str] = {}
        for name in stored:
            if super().spec(name).dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                self._scale_of[name] = self._find_scale(name, stored)
        hidden = {*self._scale_of.values(), *(name for name in stored if _ACTIVATIONS.search(name))}
        self._shown = dict.fromkeys(name for name in stored if name not in hidden)

    def _refuse_quantised(self) -> None:
        """Nothing to refuse: `__init__` checks what it finds."""

    def _find_scale(self, name: str, stored: list[str]) -> str:
        found = next((name + end for end in _SCALES if name + end in stored), None)
        if found is None:
            raise InputError(f"{self.file_of(name)}: {name!r} is FP8 and has no scale; dequantise the model first")
        shape, scale = super().spec(name).shape, super().spec(found).shape
        if scale not in ((), (1,)) and self._spread(shape, scale) is None:
            raise InputError(f"{self.file_of(found)}: {found!r} is {list(scale)}, which does not fit {list(shape)}")
        return found

    def _spread(self, shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns that share one number of a scale; None where the shapes do not fit."""
        if len(shape) != 2:
            return None
        if scale in ((shape[0],), (shape[0], 1)):
            return (1, shape[1])
        if self._block and scale == tuple(-(-n // b) for n, b in zip(shape, self._block, strict=True)):
            return (int(self._block[0]), int(self._block[1]))
        return None

    @property
    def names(self) -> list[str]:
        return super().names if self._shown is None else list(self._shown)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) if self._shown is None else name in self._shown

    def spec(self, name: str) -> TensorSpec:
        found = super().spec(name)
        return TensorSpec(name, self._dtype, found.shape) if name in self._scale_of else found

    def own_name(self, name: str) -> str | None:
        return None if name in self._scale_of else name

    def read(self, name: str) -> Tensor:
        weight = super().read(name)
        if name not in self._scale_of:
            return weight
        scale = super().read(self._scale_of[name]).float()
        if scale.numel() == 1:
            return weight.float().mul_(scale.reshape(()))
        spread = self._spread(tuple(weight.shape), tuple(scale.shape))
        assert spread is not None
        rows, columns = spread
        result = weight.float()
        if rows == 1:
            return result.mul_(scale.reshape(-1, 1))
        wide = scale.repeat_interleave(columns, 1)[:, : weight.shape[1]]
        for number, line in enumerate(wide):
            result[number * rows : (number + 1) * rows].mul_(line)
        return result

    def stored(self, name: str) -> dict[str, Tensor]:
        parts = {name: super().read(name)}
        if name in self._scale_of:
            parts[f"{name}+scale"] = super().read(self._scale_of[name])
        return parts
