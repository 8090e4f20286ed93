"""Statistics of a model's data: what a data-based merge needs beside the weights, in memory and as a file.

The file is a safetensors file. Its tensors bear the names of the weights they belong to, and its metadata say what
they are, so that a merge can map them lazily and hash them as any other input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from model_fusion.checkpoint.formats import TensorSpec, build_header, read_metadata
from model_fusion.checkpoint.output_folder import explain
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.sources import Source, resolve
from model_fusion.checkpoint.writer import as_bytes
from model_fusion.errors import InputError

Kind = Literal["gram", "fisher"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_KEY = "model_fusion_statistics"


@dataclass(frozen=True)
class Statistics(Mapping[str, Tensor]):
    """Weight's name → its statistic.

    **Arguments**
    kind: `gram`: the mean of x xᵀ over what a linear layer received, [in, in]. `fisher`: the mean of squared
        gradients of the log-likelihood, of the weight's own shape.
    count: samples (fisher), or the most inputs that any layer received (gram).
    inputs_first: names of weights stored [in, out] (GPT-2's Conv1D).
    unseen: linear layers whose inputs could not be seen, or that never ran: a merge takes their plain mean.
    about: what else the file should tell (the model's text, the labels, alpha).
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    count: int
    inputs_first: frozenset[str] = frozenset()
    unseen: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def save(self, file: str | Path) -> Path:
        """Write the file, whole or not at all. Raises InputError where its folder does not exist."""
        file = Path(file)
        check_file(file)
        facts: dict[str, Any] = {"kind": self.kind, "count": self.count, "inputs_first": sorted(self.inputs_first)}
        facts |= {"unseen": list(self.unseen), "about": dict(self.about)}
        partial = file.with_name(f".{file.name}.partial")
        specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]
        try:
            with partial.open("wb") as handle:
                handle.write(build_header(specs, metadata={_KEY: json.dumps(facts)})[0])
                for tensor in self.tensors.values():
                    handle.write(as_bytes(tensor))
            partial.replace(file)
        except OSError as error:
            raise explain(error, file) from error
        finally:
            partial.unlink(missing_ok=True)
        return file

    @classmethod
    def load(cls, file: str | Path) -> Statistics:
        """The statistics of a file, mapped. Raises InputError."""
        return open_statistics(str(file)).whole()


def check_file(file: Path) -> None:
    """Raises InputError where statistics cannot be written there."""
    if file.suffix != ".safetensors":
        raise InputError(f"{file}: statistics are a safetensors file; give a name that ends in .safetensors")
    if not file.parent.is_dir():
        raise InputError(f"no such folder: {file.parent} (of the statistics {file.name})")


class StatisticsFile(Checkpoint):
    """A file of statistics as a lazily mapped input."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        assert source.file is not None
        try:
            facts = json.loads(read_metadata(source.file)[_KEY])
            self.kind: Kind = facts["kind"]
            self.facts: dict[str, Any] = facts
            self.inputs_first = frozenset(facts["inputs_first"])
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{source.file}: holds no statistics; make them with `model-fusion statistics MODEL -o FILE`"
            ) from error
        if self.kind not in KINDS:
            raise InputError(f"{source.file}: statistics of unknown kind {self.kind!r}; known: {', '.join(KINDS)}")

    def whole(self) -> Statistics:
        """All of it."""
        facts = self.facts
        tensors = {name: self.read(name) for name in self.names}
        about = facts.get("about", {})
        return Statistics(self.kind, tensors, facts["count"], self.inputs_first, tuple(facts["unseen"]), about)


def open_statistics(text: str, relative_to: Path | None = None) -> StatisticsFile:
    """The file that a recipe names. Raises InputError where it is missing, damaged or something else."""
    path = Path(text).expanduser()
    places = [path] if relative_to is None or path.is_absolute() else [path, relative_to / path]
    found = next((place for place in places if place.is_file()), None)
    if found is None or found.suffix != ".safetensors":
        raise InputError(
            f"no such statistics: {text!r}; make the file with `model-fusion statistics MODEL -o FILE.safetensors`"
        )
    return StatisticsFile(resolve(text, relative_to))
