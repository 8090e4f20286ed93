"""Looks for a recipe's numbers. The package can be called: `model_fusion.search("recipe.yml", "out/", metric=…)`.

A function of that name would be hidden by the package as soon as any of its modules is imported.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_fusion.search.run import Found


class _Callable(ModuleType):
    def __call__(self, recipe: Any, output: str | Path, **settings: Any) -> "Found":
        """Search the ranges of a merge recipe (a path, or its content): see `model_fusion.search.run.search`."""
        from model_fusion.search.run import search

        return search(Path(recipe) if isinstance(recipe, str) else recipe, Path(output), **settings)


sys.modules[__name__].__class__ = _Callable
