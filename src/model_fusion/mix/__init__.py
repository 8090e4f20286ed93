"""Make models the experts of a mixture. The package is callable: `model_fusion.mix(recipe, output)` builds one.

A function of the same name beside the package would be replaced by the package as soon as any of its modules is
imported. Nothing here imports torch until the call.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_fusion.mix.build import Built


class _Verb(ModuleType):
    def __call__(self, recipe: Any, output: str | Path, **options: Any) -> Built:
        """See `model_fusion.mix.build.build`; a recipe may be a file, a dict or a `MixRecipe`."""
        from model_fusion.mix.build import build

        return build(Path(recipe) if isinstance(recipe, str) else recipe, Path(output), **options)


sys.modules[__name__].__class__ = _Verb
