"""What a candidate is judged by: a named measure of a language model on text, or the caller's own function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from model_fusion.errors import InputError
from model_fusion.evaluate.running import kind_of, running
from model_fusion.evaluate.text_loss import MEASURES, Judged, judged
from model_fusion.merge.in_memory import Held
from model_fusion.recipe.reading import nearest
from model_fusion.search.held_out import as_files
from model_fusion.search.study import Direction
from model_fusion.training.texts import documents

Own = Callable[[Mapping[str, Tensor], Any], float]


class Metric(Protocol):
    """`check` refuses what could not be loaded, and tells nothing else of it; `load` turns what the caller named into
    data; `score` judges one merged model by it."""

    name: str
    direction: Direction

    def check(self, data: Any) -> None: ...
    def load(self, data: Any) -> Any: ...
    def score(self, merged: Held, data: Any) -> float: ...


class OwnMetric:
    """The caller's function of (merged state dict, data); higher is better unless `direction` says otherwise."""

    def __init__(self, function: Own, direction: Direction | None) -> None:
        self.name = getattr(function, "__qualname__", type(function).__qualname__)
        self.direction: Direction = direction or "maximize"
        self._function = function

    def check(self, data: Any) -> None:
        """Anything goes."""

    def load(self, data: Any) -> Any:
        return data() if callable(data) else data

    def score(self, merged: Held, data: Any) -> float:
        return float(self._function(merged.tensors, data))


class TextMetric:
    """One of `MEASURES` on text files; lower is better."""

    direction: Direction = "minimize"

    def __init__(
        self, name: str, window: int, config: Mapping[str, Any], files: Mapping[str, bytes], device: str = "cpu"
    ) -> None:
        """`config` is that of the model to judge, `files` its small files, the tokenizer too; `device`: where."""
        if not config.get("model_type"):
            raise InputError(f"metric {name} judges language models; for others give mf.search a function as metric")
        self._device = device
        self.name, self._window, self._kind = name, window, kind_of(config, files, f"metric {name}")

    def check(self, data: Any) -> None:
        self.load(data)

    def load(self, data: Any) -> Judged:
        files = as_files(data)
        if files is None:
            raise InputError(f"metric {self.name} reads text files: give paths as validation and test")
        return judged(documents([str(file) for file in files]), self._kind.tokenizer, self._window)

    def score(self, merged: Held, data: Judged) -> float:
        return MEASURES[self.name](running(self._kind, merged.tensors, self._device), data)


def check_name(metric: str | Own, direction: Direction | None) -> None:
    """Raises InputError for a name that is none, or a direction that a named metric cannot have."""
    if isinstance(metric, str):
        if metric not in MEASURES:
            raise InputError(f"metric {metric!r}: {nearest(metric, MEASURES)}, or a function through mf.search")
        if direction not in (None, "minimize"):
            raise InputError(f"metric {metric!r} is better when lower: leave direction out")
    elif not callable(metric):
        raise InputError(f"metric {metric!r}: give a name ({', '.join(MEASURES)}) or a function")
    if direction not in (None, "minimize", "maximize"):
        raise InputError(f"direction {direction!r}: give minimize or maximize")
