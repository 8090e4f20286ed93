"""Finishing an adapter's folder: its settings, lineage and card."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from model_fusion.checkpoint import card, lineage
from model_fusion.checkpoint.adapter import CONFIG
from model_fusion.checkpoint.appending import AppendingWriter
from model_fusion.checkpoint.reader import Checkpoint


def finish(
    writer: AppendingWriter,
    verb: str,
    arguments: Sequence[str],
    recipe: Mapping[str, Any],
    parents: Sequence[Checkpoint],
    config: bytes,
    notes: Sequence[str],
) -> None:
    """Write the small files and put the folder at its target. `recipe` holds the options as the command spells them."""
    words = ["model-fusion", *verb.split(), *arguments, "-o", "out"]
    for key, value in recipe.items():
        if key in ("finetune", "adapters"):
            continue
        numbers = isinstance(value, list) and all(isinstance(item, float) for item in value)
        for item in value if isinstance(value, list) and not numbers else [value]:
            item = ",".join(map(str, item)) if numbers else item
            words += [f"--{key}"] if item is True else [f"--{key}", str(item)]
    files = {CONFIG: config}
    files[lineage.NAME] = lineage.build(
        "adapter",
        verb,
        recipe,
        parents,
        writer.specs,
        writer.done,
        writer.inputs_of,
        files,
        command=shlex.join(words),
        defaults={},
        notes=notes,
    )
    files[card.NAME] = card.build(files[lineage.NAME])
    writer.finish(files, last=CONFIG)
