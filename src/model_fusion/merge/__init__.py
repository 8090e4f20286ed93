"""Weight-space merges. The package itself can be called: `model_fusion.merge("recipe.yml", "out/")`.

A function of that name would be hidden by the package as soon as any of its modules is imported.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_fusion.recipe.merge import MergeRecipe


class _Callable(ModuleType):
    def __call__(
        self, recipe: "str | Path | Mapping[str, Any] | MergeRecipe", output: str | Path, **flags: Any
    ) -> Path:
        """Merge as the recipe (a path, its content as a dict, or a `MergeRecipe`) says; returns the output folder.

        Paths inside a recipe file start from its folder, those in a dict from the current one. `flags` are those of
        `model_fusion.merge.engine.merge`: overwrite, resume, threads, shard_size, allow_nan, device,
        trust_remote_code, fill_missing.
        """
        from model_fusion.merge import engine
        from model_fusion.recipe.merge import parse

        if isinstance(recipe, str):
            recipe = Path(recipe)
        elif isinstance(recipe, Mapping):
            recipe = parse(dict(recipe))
        return engine.merge(recipe, Path(output), **flags)


sys.modules[__name__].__class__ = _Callable
