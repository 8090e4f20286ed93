"""An expert saved on its own: its files and `expert.json`, to be named by a fuse recipe or loaded in Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model_fusion.errors import InputError, IntegrityError
from model_fusion.fuse.experts.base import Expert
from model_fusion.fuse.experts.registry import load_expert, save_expert

CONFIG = "expert.json"


def write_expert(expert: Expert, folder: str | Path) -> None:
    """Save `expert` into `folder`. Raises InputError where the folder holds something else."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file())):
        raise InputError(f"{folder}: exists and is no saved expert; name another folder")
    config = save_expert(expert, folder)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_expert(folder: str | Path, *, given: Any = None, allow_pickle: bool = False) -> Expert:
    """Load what `write_expert` wrote; `given` as in `load_expert`. Raises InputError or IntegrityError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such file or folder")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: holds no {CONFIG}; expected a folder that write_expert made")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise IntegrityError(f"{folder / CONFIG}: damaged; save the expert again") from None
    if not isinstance(config, dict):
        raise IntegrityError(f"{folder / CONFIG}: damaged; save the expert again")
    return load_expert(folder, config, given=given, allow_pickle=allow_pickle)
