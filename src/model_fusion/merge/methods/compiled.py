"""Optional kernels for the hottest loops, compiled by numba where it is installed: the extra `fast`.

They return exactly what the numpy or torch code beside their callers returns; tests compare them bit by bit. They
compile once a machine and are loaded from numba's cache after that. Their bodies are in `kernels`.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

from model_fusion.merge.methods import kernels

OFF = "MODEL_FUSION_NO_COMPILE"
"""Set this environment variable to run without the kernels."""


@cache
def kernel(name: str) -> Any:
    """The compiled function of that name; None where numba is not installed or is switched off."""
    if os.environ.get(OFF) or importlib.util.find_spec("numba") is None:
        return None
    from numba import njit

    try:
        return njit(nogil=True, cache=True)(getattr(kernels, name))
    except RuntimeError:  # nowhere to keep the compiled code: each process compiles it again
        return njit(nogil=True)(getattr(kernels, name))
