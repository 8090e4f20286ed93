"""Lineage and card of a folder that is filled by others: its tensors are hashed as they lie there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model_fusion.checkpoint import card, lineage
from model_fusion.checkpoint.reader import Checkpoint
from model_fusion.checkpoint.sources import Source
from model_fusion.checkpoint.writer import as_bytes


def record(
    folder: Path,
    kind: str,
    method: str,
    recipe: Mapping[str, Any],
    parents: Sequence[Checkpoint],
    inputs: Callable[[str], dict[str, str]],
    files: Mapping[str, bytes],
    **told: Any,
) -> None:
    """Write both into the folder. `inputs`: a tensor's name → {parent:tensor → SHA-256}; `told`: what else
    `lineage.build` takes."""
    own = Checkpoint(Source(str(folder), folder))
    hashes = {name: hashlib.sha256(as_bytes(own.read(name))).hexdigest() for name in own.names}
    sources = {name: inputs(name) for name in own.names}
    made = lineage.build(kind, method, recipe, parents, list(own), hashes, sources, files, defaults={}, **told)
    (folder / lineage.NAME).write_bytes(made)
    (folder / card.NAME).write_bytes(card.build(made))
