"""A file of finished cells, so that an interrupted audit goes on where it stopped: one JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from model_fusion.errors import IntegrityError


def finished(file: Path) -> int:
    """How many cells are kept in a journal; 0 where there is none."""
    return max(0, file.read_text().count("\n") - 1) if file.is_file() else 0


class Journal:
    """The first line says which audit this is (`fingerprint`); each other line is one finished cell."""

    def __init__(self, file: Path, fingerprint: str, *, resume: bool) -> None:
        """Opens `file`; without `resume` an older journal is replaced. Raises IntegrityError where the journal to
        resume belongs to another audit. A last line that an interrupt cut off is dropped."""
        self.file, self.cells = file, dict[str, dict[str, Any]]()
        if resume and file.is_file():
            lines = [line for line in file.read_text().split("\n")[:-1] if line]
            head, *rest = [json.loads(line) for line in lines] or [{}]
            if head.get("fingerprint") != fingerprint:
                raise IntegrityError(f"{file}: belongs to another fusion, task or setting: delete it to start afresh")
            self.cells = {cell["key"]: cell for cell in rest}
        file.parent.mkdir(parents=True, exist_ok=True)
        work = file.with_name(f".{file.name}.incomplete")
        entries = [{"fingerprint": fingerprint}, *self.cells.values()]
        work.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        os.replace(work, file)

    def add(self, key: str, cell: dict[str, Any]) -> None:
        """Keep a finished cell, on disk before this returns."""
        self.cells[key] = {"key": key, **cell}
        with self.file.open("a") as out:
            out.write(json.dumps(self.cells[key]) + "\n")
            out.flush()
            os.fsync(out.fileno())
