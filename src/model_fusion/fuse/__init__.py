"""Fuse experts into an LLM. The package is callable: `model_fusion.fuse(recipe, output)` is the verb itself.

A function of the same name beside the package would be replaced by the package as soon as any of its modules is
imported. Nothing here imports torch until the call.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_fusion.run.fuse import FuseResult


class _Verb(ModuleType):
    def __call__(self, recipe: Any, output: Any, **options: Any) -> FuseResult:
        """See `model_fusion.run.fuse.fuse`."""
        from model_fusion.run.fuse import fuse

        return fuse(recipe, output, **options)


sys.modules[__name__].__class__ = _Verb
