"""A plain Python function as an expert. It cannot be saved: whoever loads hands it in again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.fuse.experts.base import Decision
from model_fusion.fuse.experts.reading import checked_items
from model_fusion.fuse.experts.schema import InputSchema
from model_fusion.fuse.experts.scored import ScoredExpert, Words, as_given, tensor

Output = Literal["probabilities", "logits", "value", "features"]


class CallableExpert(ScoredExpert):
    """`function` maps a list of B checked items to an array [B, D] (or [B]; [B, T, D] for features).

    **Arguments**: `output` says what the numbers are: "probabilities" or "logits" (log-probabilities are
    logits) over `classes`, a regressor's "value", or "features", which carry no decision.
    """

    kind: ClassVar[str] = "callable"

    def __init__(
        self,
        function: Callable[[list[Any]], Any],
        inputs: InputSchema,
        *,
        output: Output = "probabilities",
        classes: Sequence[str] | None = None,
        words: Words | None = None,
        feature_shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(inputs, tap="output", classes=classes, preprocess=None, words=words)
        if output not in get_args(Output):
            raise InputError(f"output: expected one of {', '.join(get_args(Output))}, got {output!r}")
        if (output in ("probabilities", "logits")) != (classes is not None):
            raise InputError(f"callable expert: output={output!r} {'needs' if classes is None else 'has no'} classes")
        self.function = function
        self.output: Output = output
        self._learn_shape(feature_shape)

    def _prepare(self, inputs: Sequence[Any]) -> list[Any]:
        return checked_items(inputs, self.inputs)

    def _call(self, items: list[Any]) -> Tensor:
        values = tensor(self.function(items)).detach().cpu().float()
        if values.ndim == 0 or len(values) != len(items):
            raise InputError(f"callable expert: {len(items)} inputs gave an array of shape {list(values.shape)}")
        return values

    def _tapped(self, prepared: list[Any]) -> Tensor:
        values = self._call(prepared)
        if self.output == "probabilities" or self.output == "logits":
            return self._log_probs(values, self.output)
        return values

    def _decided(self, prepared: list[Any]) -> Decision:
        if self.output == "features":
            raise InputError(
                "callable expert: output='features' carries no decision; use probabilities, logits or value"
            )
        return self._decision_from(self._call(prepared), "logits" if self.output == "value" else self.output)

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes nothing: the config says that the function must be given again."""
        return self._config([], saved=False, output=self.output)

    @classmethod
    def load(
        cls, folder: Path, config: dict[str, Any], *, given: Any = None, allow_pickle: bool = False
    ) -> CallableExpert:
        """`given` is the function or `Given(function=…)`. Raises InputError without one."""
        parts = as_given(given, "function")
        if parts.function is None:
            raise InputError("a callable expert is code that no file holds: load it with given=the function")
        options = cls._options(config, parts)
        del options["tap"], options["preprocess"]
        return cls(parts.function, output=config["output"], **options)
