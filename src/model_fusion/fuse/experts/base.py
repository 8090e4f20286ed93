"""What an expert is: inputs in, features and words out. It knows no LLM.

Every kind of expert (torch module, scikit-learn estimator, ONNX graph, callable) implements `Expert`;
bridges see only `Features`, baselines only `Decision` and the words of `describe`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from model_fusion.fuse.experts.schema import InputSchema

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Features:
    """What a bridge reads: `values` float32 [B, T, D] and `mask` bool [B, T] (True where a value is
    present)."""

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


@dataclass(frozen=True)
class Given:
    """The live parts that no file holds, handed to `load`: code is never read from a saved folder.

    `module` is a torch expert's architecture, `function` a callable expert's function; `preprocess` and
    `words` are the callables the saved expert was built with; `trusted` names types of an skops file to
    accept besides those of scikit-learn, numpy and scipy.
    """

    module: torch.nn.Module | None = None
    function: Callable[[list[Any]], Any] | None = None
    preprocess: Callable[[Sequence[Any]], Any] | None = None
    words: Callable[[Any], str] | None = None
    trusted: tuple[str, ...] = ()


class Expert(ABC):
    """One small model with a skill. A batch of inputs is a sequence of B items that fit `inputs`."""

    kind: ClassVar[str]
    """Registry name, written to and read from the saved config ("torch", "sklearn", "onnx", "callable")."""
    inputs: InputSchema
    feature_shape: tuple[int, int]
    """(T, D) of the encoded features: T values a prompt may read, D numbers each."""

    @abstractmethod
    def encode(self, inputs: Sequence[Any]) -> Features:
        """Features of B inputs at the tap (default: the expert's output), float32 [B, T, D],
        un-normalised."""

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
    def load(cls, folder: Path, config: dict[str, Any], *, given: Any = None, allow_pickle: bool = False) -> Expert:
        """Rebuild from `save`'s files. `given` is the live object the caller hands in where the kind needs
        one (a torch module's architecture, a callable): no class named in a config is ever imported."""

    @staticmethod
    def from_torch(module: torch.nn.Module, inputs: InputSchema, **options: Any) -> Expert:
        """A torch module; options as in `TorchExpert`."""
        from model_fusion.fuse.experts.torch_module import TorchExpert

        return TorchExpert(module, inputs, **options)

    @staticmethod
    def from_sklearn(estimator: Any, inputs: InputSchema, **options: Any) -> Expert:
        """A fitted scikit-learn estimator or Pipeline, or the path of a file; options as in
        `SklearnExpert`."""
        from model_fusion.fuse.experts.sklearn_estimator import SklearnExpert

        return SklearnExpert(estimator, inputs, **options)

    @staticmethod
    def from_onnx(graph: str | Path | bytes, inputs: InputSchema, **options: Any) -> Expert:
        """An ONNX file or its bytes; options as in `OnnxExpert`."""
        from model_fusion.fuse.experts.onnx_graph import OnnxExpert

        return OnnxExpert(graph, inputs, **options)

    @staticmethod
    def from_callable(function: Callable[[list[Any]], Any], inputs: InputSchema, **options: Any) -> Expert:
        """A Python function of a list of items; options as in `CallableExpert`."""
        from model_fusion.fuse.experts.callable_expert import CallableExpert

        return CallableExpert(function, inputs, **options)
