"""Estimator files: skops with a trusted-types list; pickle and joblib only behind an explicit flag."""

from __future__ import annotations

import importlib
import inspect
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model_fusion.errors import InputError, IntegrityError, MissingDependencyError

LIBRARIES = ("sklearn", "numpy", "scipy")
PICKLE_RISK = (
    "loading {name} with allow_pickle=True: a pickle or joblib file runs whatever code its author put in it, "
    "with your rights, as soon as it is read; do this only with files you wrote yourself"
)


def write_skops(estimator: Any, path: Path, trusted: Sequence[str]) -> None:
    """Write `estimator`; InputError names types that `read_skops` would refuse."""
    sio = _skops()
    sio.dump(estimator, path)
    refused = _refused(sio.get_untrusted_types(file=path), trusted)
    if refused:
        path.unlink()
        raise InputError(
            f"the estimator holds types that would be refused at load: {', '.join(refused)}; "
            "name them in trusted=(...) if you know what they do, or use save_as='joblib'"
        )


def read_skops(path: Path, trusted: Sequence[str]) -> Any:
    """The estimator in a skops file. Besides what skops itself trusts, only classes of scikit-learn, numpy
    and scipy and the names in `trusted` are built; anything else is refused by name with an InputError."""
    sio = _skops()
    try:
        found = sio.get_untrusted_types(file=path)
        refused = _refused(found, trusted)
        if refused:
            raise InputError(
                f"{path.name} holds types that are not trusted: {', '.join(refused)}; "
                "if you know what they do, "
                "name them: trusted=(...), or given=Given(trusted=(...)) for a saved expert"
            )
        return sio.load(path, trusted=found)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise IntegrityError(f"{path.name} is not a readable skops file: {error}") from None


def read_estimator(path: Path, *, allow_pickle: bool, trusted: Sequence[str]) -> Any:
    """An estimator from .skops, or from a pickle or joblib file when `allow_pickle` says so (with a
    warning)."""
    if not path.is_file():
        raise InputError(f"no estimator file at {path}")
    if path.suffix == ".skops":
        return read_skops(path, trusted)
    if not allow_pickle:
        raise InputError(
            f"{path.name} is a pickle or joblib file, which can run any code when read; "
            "save the estimator with skops, or pass allow_pickle=True if you wrote the file yourself"
        )
    warnings.warn(PICKLE_RISK.format(name=path.name), UserWarning, stacklevel=2)
    import joblib

    return joblib.load(path)


def _skops() -> Any:
    try:
        import skops.io
    except ImportError:
        raise MissingDependencyError(
            "scikit-learn experts are saved with skops: pip install 'model-fusion[sklearn]'"
        ) from None
    return skops.io


def _refused(found: Sequence[str], trusted: Sequence[str]) -> list[str]:
    return [name for name in found if name not in trusted and not _is_library_class(name)]


def _is_library_class(name: str) -> bool:
    """True for a class of the libraries. A function is not enough: numpy's test helpers can execute text."""
    parts = name.split(".")
    if parts[0] not in LIBRARIES or any(part in ("__main__", "tests", "testing", "_private") for part in parts):
        return False
    try:
        return inspect.isclass(getattr(importlib.import_module(".".join(parts[:-1])), parts[-1]))
    except (ImportError, AttributeError, ValueError):
        return False
