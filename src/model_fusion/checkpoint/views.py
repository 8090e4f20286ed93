"""Checkpoints seen through a change (other names, other rows), and one that is only planned. Reads nothing early."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from model_fusion.checkpoint.formats import TensorSpec
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.sources import Source
from model_fusion.errors import InputError


class View(Checkpoint):
    """A checkpoint that answers as `inner` does; sub-classes change some of the answers."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner = inner
        self.source, self.folder, self.config = inner.source, inner.folder, inner.config

    @property
    def names(self) -> list[str]:
        return self.inner.names

    def __contains__(self, name: object) -> bool:
        return name in self.inner

    def spec(self, name: str) -> TensorSpec:
        return self.inner.spec(name)

    def file_of(self, name: str) -> Path:
        return self.inner.file_of(name)

    @property
    def names_on_disk(self) -> list[str]:
        return self.inner.names_on_disk

    def own_name(self, name: str) -> str | None:
        return self.inner.own_name(name)

    def files(self) -> dict[str, bytes]:
        return self.inner.files()

    def stored(self, name: str) -> dict[str, Tensor]:
        return self.inner.stored(name)

    def read(self, name: str) -> Tensor:
        return self.inner.read(name)


class Renamed(View):
    """The same tensors under other names: `names_of` maps a new name to the one on disk."""

    def __init__(self, inner: Checkpoint, names_of: Mapping[str, str]) -> None:
        super().__init__(inner)
        self._names_of = dict(names_of)

    @property
    def names(self) -> list[str]:
        return list(self._names_of)

    def __contains__(self, name: object) -> bool:
        return name in self._names_of

    def spec(self, name: str) -> TensorSpec:
        found = self.inner.spec(self._names_of[name])
        return TensorSpec(name, found.dtype, found.shape)

    def file_of(self, name: str) -> Path:
        return self.inner.file_of(self._names_of[name])

    def own_name(self, name: str) -> str | None:
        return self.inner.own_name(self._names_of[name])

    def stored(self, name: str) -> dict[str, Tensor]:
        return self.inner.stored(self._names_of[name])

    def read(self, name: str) -> Tensor:
        return self.inner.read(self._names_of[name])


class Planned(Checkpoint):
    """A checkpoint that is going to be written: its tensors' shapes, its config and small files, and no weights."""

    def __init__(
        self, name: str, specs: Sequence[TensorSpec], config: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> None:
        self.source, self.folder, self.config = Source(name, Path(name)), Path(name), dict(config)
        self._specs = {spec.name: spec for spec in specs}
        self._small = dict(files)

    @property
    def names(self) -> list[str]:
        return list(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def spec(self, name: str) -> TensorSpec:
        return self._specs[name]

    def file_of(self, name: str) -> Path:
        return self.folder

    def files(self) -> dict[str, bytes]:
        return dict(self._small)

    def same(self, first: str, second: str) -> bool:
        return False  # a tied head that equals its embedding is not written

    def read(self, name: str) -> Tensor:
        raise InputError(f"{self.source.spec}: not merged yet, so {name!r} cannot be read")


class Remade(View):
    """`inner`, with some tensors made anew: `made` maps a name to its shape and to a function that makes it."""

    def __init__(self, inner: Checkpoint, made: Mapping[str, tuple[tuple[int, ...], Callable[[], Tensor]]]) -> None:
        super().__init__(inner)
        self._made = dict(made)

    def spec(self, name: str) -> TensorSpec:
        found = self.inner.spec(name)
        return TensorSpec(name, found.dtype, self._made[name][0]) if name in self._made else found

    def own_name(self, name: str) -> str | None:
        return None if name in self._made else self.inner.own_name(name)

    def read(self, name: str) -> Tensor:
        return self._made[name][1]() if name in self._made else self.inner.read(name)

    def same(self, first: str, second: str) -> bool:
        alike = (first in self._made) == (second in self._made)  # made from rows of the same numbers, or not at all
        return self.inner.same(first, second) if alike else super().same(first, second)
