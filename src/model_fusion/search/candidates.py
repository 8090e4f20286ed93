"""What a search may try: the recipe with values in its ranges, and plain task arithmetic. Merges in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.views import Planned
from model_fusion.errors import InputError
from model_fusion.merge import engine
from model_fusion.merge.in_memory import Held
from model_fusion.merge.plan import MergePlan
from model_fusion.recipe.documents import joined
from model_fusion.recipe.merge import PATHS, MergeRecipe, parse
from model_fusion.recipe.ranges import Choices, Free, Value, fill, find
from model_fusion.recipe.reading import yaml_documents
from model_fusion.search import baseline


@dataclass(frozen=True)
class Flags:
    """How models are read and merged."""

    threads: int = 0
    trust_remote_code: bool = False
    fill_missing: str | None = None


class Candidates:
    """Everything is checked here, and every model opened, before the first trial.

    `plain`: λ → recipe of task arithmetic; empty where it is not defined, and then `why_not` says why.
    """

    def __init__(self, recipe: Path | Mapping[str, Any], base: str | None, flags: Flags) -> None:
        where = str(recipe) if isinstance(recipe, Path) else "recipe"
        self.folder = recipe.parent if isinstance(recipe, Path) else None
        self.data: Any = dict(recipe) if not isinstance(recipe, Path) else _read(recipe)
        self._where, self._flags = where, flags
        self.space: dict[str, Free] = find(self.data, where)
        if not self.space:
            raise InputError(f"{where}: no number is marked as a range: write one as weight: {{range: [0, 1]}}")
        self._opened: dict[str, Checkpoint] = {}
        self.shape: MergePlan = self._check()
        first = self.recipe({name: free.ends()[0] for name, free in self.space.items()})
        if base is not None and base not in first.model_names():
            self._plan(baseline.plain(first, base)[0][1])  # an unknown model is named here, by itself
        self.plain: dict[float, MergeRecipe] = {}
        self.why_not = ""
        plain = baseline.plain(first, base)
        try:
            self._plan(plain[0][1])
            self.plain = dict(plain)
        except InputError as error:
            self.why_not = str(error)

    def _check(self) -> MergePlan:
        """Plan with every range at its ends, and with each choice."""
        ends = [{name: free.ends()[end] for name, free in self.space.items()} for end in (0, 1)]
        choices = [
            ends[0] | {name: option}
            for name, free in self.space.items()
            if isinstance(free, Choices)
            for option in free.options[1:-1]
        ]
        return [self._plan(self.recipe(values)) for values in (*choices, *ends)][-1]

    def _plan(self, recipe: MergeRecipe) -> MergePlan:
        return engine.plan(
            recipe,
            trust_remote_code=self._flags.trust_remote_code,
            fill_missing=self._flags.fill_missing,
            relative_to=self.folder,
            opened=self._opened,
        )

    def recipe(self, values: Mapping[str, Value]) -> MergeRecipe:
        """The recipe with these values. Raises InputError where they make none."""
        return parse(fill(self.data, values), self._where)

    def merged(self, recipe: MergeRecipe) -> Held:
        """The merge, in memory. Raises InputError."""
        return engine.merge_in_memory(
            recipe,
            self.folder,
            self._opened,
            threads=self._flags.threads,
            trust_remote_code=self._flags.trust_remote_code,
            fill_missing=self._flags.fill_missing,
        )

    def fingerprint(self) -> str:
        """Identity of the models on disk, and of the statistics that a method reads beside them."""
        every = [part.every() for part in (self.shape, *self.shape.stages.values())]
        found = {name: c for part in every for name, c in part.items() if not isinstance(c, Planned)}
        return engine.fingerprint(dict(sorted((self._opened | found).items())))

    def places(self) -> list[Path]:
        """Files and folders that are read."""
        return [place for checkpoint in self._opened.values() for place in checkpoint.source.places]

    def write(self, recipe: MergeRecipe, output: Path, notes: list[str], files: dict[str, bytes], over: bool) -> None:
        """Merge into a folder, atomically; `notes` and `files` join its lineage."""
        engine.merge(
            recipe,
            output,
            overwrite=over,
            threads=self._flags.threads,
            trust_remote_code=self._flags.trust_remote_code,
            fill_missing=self._flags.fill_missing,
            relative_to=self.folder,
            notes=notes,
            files=files,
        )

    def portable(self, recipe: MergeRecipe, output: Path) -> dict[str, Any]:
        """The recipe as plain data whose local paths start from `output`, where it will lie."""
        data = recipe.model_dump(exclude_none=True, exclude_defaults=True, mode="json")
        moved: dict[str, Any] = self._moved(data, output, set(recipe.merges))
        return moved

    def _moved(self, data: Any, output: Path, merges: set[str]) -> Any:
        if isinstance(data, list):
            return [self._moved(item, output, merges) for item in data]
        if not isinstance(data, dict):
            return data
        return {
            key: "+".join(self._from(part, output) for part in item.split("+"))
            if key in PATHS and isinstance(item, str) and item not in merges
            else self._moved(item, output, merges)
            for key, item in data.items()
        }

    def _from(self, name: str, output: Path) -> str:
        path = Path(name).expanduser()
        found = next((p for p in (path, (self.folder or Path()) / path) if p.exists()), None)
        return name if found is None else os.path.relpath(found.resolve(), output.resolve())


def _read(path: Path) -> Any:
    documents = yaml_documents(path)
    return joined([d for d in documents if d is not None] or [None], str(path))
