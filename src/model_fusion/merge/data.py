"""Which statistics a data-based merge takes for each tensor. All is checked before a byte is written."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Protocol

from model_fusion.checkpoint.formats import TensorSpec
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.statistics import StatisticsFile
from model_fusion.recipe.merge import ModelEntry, SliceSource

Sources = Sequence[ModelEntry | SliceSource]


class _Method(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def needs_data(self) -> Any: ...


class Data:
    """`files`: the recipe's statistics by the text that names them. `problems` grows with every question."""

    def __init__(self, method: _Method, files: Mapping[str, StatisticsFile]) -> None:
        self.method, self.files = method, files
        self.problems: list[str] = []
        self._used = False
        for text, file in files.items():
            if method.needs_data is None:
                self.problems.append(f"{method.name} takes no statistics: remove {text!r}")
            elif file.kind != method.needs_data:
                wanted = method.needs_data
                self.problems.append(
                    f"{text}: statistics of kind {file.kind}, {method.name} takes {wanted} (statistics --kind {wanted})"
                )

    def check(self, sources: Sources, checkpoints: Mapping[str, Checkpoint]) -> None:
        """Every model brings statistics, and they are of a model with such tensors."""
        if self.method.needs_data is None:
            return
        for source in sources:
            if source.statistics is None:
                self._problem(
                    f"{source.model}: {self.method.name} needs its statistics; make them with `model-fusion "
                    f"statistics {source.model} --kind {self.method.needs_data}` and name the file beside the model"
                )
                continue
            own = set(checkpoints[source.model].names_on_disk)
            odd = next((name for name in self.files[source.statistics].names if name not in own), None)
            if odd is not None:
                self._problem(f"{source.statistics}: of tensor {odd!r}, which {source.model} does not have")

    def of(
        self, sources: Sources, names: Sequence[str], checkpoints: Mapping[str, Checkpoint], spec: TensorSpec
    ) -> tuple[tuple[str, str], ...]:
        """(file's text, tensor) for each source; empty where no file has a statistic of the tensor."""
        if self.method.needs_data is None or any(s.statistics is None for s in sources):
            return ()
        own = [checkpoints[s.model].own_name(name) for s, name in zip(sources, names, strict=True)]
        texts = [str(source.statistics) for source in sources]
        held = [name is not None and name in self.files[text] for text, name in zip(texts, own, strict=True)]
        if not any(held) or None in own:
            return ()
        if not all(held):
            lacking = texts[held.index(False)]
            self._problem(f"{lacking}: no statistic of {spec.name!r}, of which {texts[held.index(True)]} has one")
            return ()
        found = [(text, str(name)) for text, name in zip(texts, own, strict=True)]
        if len({self.inputs_first(text, name) for text, name in found}) > 1:
            self._problem(f"{texts[0]}: stores {spec.name!r} in another order than the other statistics: collect again")
        for text, name in found:
            shape, wanted = self.files[text].spec(name).shape, self._shape(spec, self.inputs_first(text, name))
            if shape != wanted:
                self._problem(f"{text}: the statistic of {name!r} is {list(shape)}, its tensor needs {list(wanted)}")
        self._used = True
        return tuple(found)

    def inputs_first(self, text: str, name: str) -> bool:
        """Whether a weight is stored [in, out]."""
        return name in self.files[text].inputs_first

    def finish(self) -> list[str]:
        """All problems, after every tensor has been asked for."""
        if self.method.needs_data is not None and not self._used and not self.problems:
            self._problem(f"{self.method.name}: the statistics hold nothing of any tensor: collect them again")
        return self.problems

    def _shape(self, spec: TensorSpec, inputs_first: bool) -> tuple[int, ...]:
        if self.method.needs_data != "gram":
            return spec.shape
        width = spec.shape[0] if inputs_first else prod(spec.shape[1:])
        return (width, width)

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)
