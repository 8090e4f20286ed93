"""Where a study lives until it is finished: a hidden folder beside the output, for one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from model_fusion.errors import InputError

_SETTINGS = "settings.json"


class Workroom:
    """Use as a context manager. What interrupts it leaves it, for `resume`; `finish` removes it."""

    def __init__(self, output: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """`settings` say which study it is. Raises InputError where another study, or an unfinished one that nobody
        asked to resume, is in the way; then nothing is written."""
        target = Path(os.path.abspath(output))
        self.folder = target.with_name(f".{target.name}.search")
        self._settings, self._lock = json.loads(json.dumps(settings)), -1
        known = self.folder / _SETTINGS
        if known.is_file():
            if not resume:
                raise InputError(
                    f"an unfinished search is in {self.folder}: pass --resume to go on, or remove that folder"
                )
            was = json.loads(known.read_text(encoding="utf-8"))
            changed = [key for key, value in self._settings.items() if was.get(key) != value]
            if changed:
                raise InputError(
                    f"the search in {self.folder} had another {' and '.join(changed)}: give the same again, or remove "
                    "that folder to search anew"
                )

    def __enter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise InputError(f"another process searches in {self.folder}: wait for it to end") from error
        if not (self.folder / _SETTINGS).is_file():
            work = self.folder / f".{_SETTINGS}"
            work.write_text(json.dumps(self._settings, indent=1), encoding="utf-8")
            os.replace(work, self.folder / _SETTINGS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        os.close(self._lock)

    def finish(self) -> None:
        """The study is in the output: nothing here is needed any more."""
        shutil.rmtree(self.folder)
