"""What an expert is: inputs in, features and words out. It knows no LLM.

Every kind of expert (torch module, scikit-learn estimator, ONNX graph, callable) implements `Expert`;
bridges see only `Features`, baselines only `Decision` and the words of `describe`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from model_fusion.fuse.experts.schema import InputSchema

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Features:
    """What a bridge reads: `values` float32 [B, T, D] and `mask` bool [B, T] (True where a value is present)."""

    values: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class ClassDecision:
    """A classifier's opinion: `log_probs` float32 [B, C] over `classes` (C names, in column order)."""

    classes: tuple[str, ...]
    log_probs: torch.Tensor


@dataclass(frozen=True)
class ValueDecision:
    """A regressor's opinion: `value` float32 [B] and its `spread` (one standard deviation) [B] or None."""

    value: torch.Tensor
    spread: torch.Tensor | None = None


Decision = ClassDecision | ValueDecision


class Expert(ABC):
    """One small model with a skill. A batch of inputs is a sequence of B items that fit `inputs`."""

    kind: ClassVar[str]
    """Registry name, written to and read from the saved config ("torch", "sklearn", "onnx", "callable")."""
    inputs: InputSchema
    feature_shape: tuple[int, int]
    """(T, D) of the encoded features: T values a prompt may read, D numbers each."""

    @abstractmethod
    def encode(self, inputs: Sequence[Any]) -> Features:
        """Features of B inputs at the tap (default: the expert's output), float32 [B, T, D], un-normalised."""

    @abstractmethod
    def decide(self, inputs: Sequence[Any]) -> Decision:
        """The expert's decision on B inputs."""

    @abstractmethod
    def describe(self, inputs: Sequence[Any]) -> list[str]:
        """The decision in words, one string for each input: what a tool call would return."""

    @abstractmethod
    def save(self, folder: Path) -> dict[str, Any]:
        """Write the expert's own files into `folder`; return the JSON config that `load` needs.

        An expert that cannot be written (a callable) returns a config with `"saved": false`.
        """

    @classmethod
    @abstractmethod
    def load(
        cls, folder: Path, config: dict[str, Any], *, given: Any = None, allow_pickle: bool = False
    ) -> Expert:
        """Rebuild from `save`'s files. `given` is the live object the caller hands in where the kind needs one
        (a torch module's architecture, a callable): no class named in a config is ever imported."""
