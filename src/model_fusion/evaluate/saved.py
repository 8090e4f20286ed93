"""A saved fusion and the task to audit it on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model_fusion.errors import InputError
from model_fusion.evaluate.tasks import task as make_task
from model_fusion.evaluate.tasks.base import Task
from model_fusion.evaluate.tasks.examples import examples_task
from model_fusion.fuse.data import read_examples
from model_fusion.fuse.experts.base import Expert, Given
from model_fusion.fuse.fit import Example
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.saving import read_config


def load_for_audit(
    fusion: FusedModel | str | Path,
    task: Task | str | None = None,
    examples: Sequence[Example] | str | Path | None = None,
    given: Mapping[str, Any] | None = None,
    *,
    allow_pickle: bool = False,
) -> tuple[FusedModel, Task]:
    """The fusion (a model, or a saved folder) and its task: `examples`, else `task` (or its name), else what the
    fusion recorded. The task's labels and scores are those of the fusion's own expert. Raises InputError."""
    if task is not None and examples is not None:
        raise InputError("give either a task or examples, not both")
    recorded = (fusion.task if isinstance(fusion, FusedModel) else read_config(Path(fusion)).get("task")) or {}
    if examples is not None:
        fused = (
            fusion
            if isinstance(fusion, FusedModel)
            else FusedModel.from_pretrained(fusion, given=given, allow_pickle=allow_pickle)
        )
        schemas = {name: expert.inputs for name, expert in fused.experts.items()}
        rows = read_examples(Path(examples), schemas) if isinstance(examples, (str, Path)) else examples
        return fused, examples_task(rows, fused.experts)
    if task is None and "name" not in recorded:
        raise InputError("this fusion records no task: name one with --task, or give your own --examples")
    if not isinstance(task, Task):
        name = task or recorded["name"]
        task = make_task(name, **(recorded.get("options", {}) if name == recorded.get("name") else {}))
    if isinstance(fusion, FusedModel):
        fused = fusion
    else:
        live = {task.expert_name: live_parts(task.expert), **(given or {})}
        fused = FusedModel.from_pretrained(fusion, given=live, allow_pickle=allow_pickle)
    if task.expert_name not in fused.experts:
        raise InputError(
            f"task {task.name!r} has an expert {task.expert_name!r}, this fusion {', '.join(fused.experts)}"
        )
    return fused, task.retold(fused.experts[task.expert_name])


def live_parts(expert: Expert) -> Given:
    """What no file holds of an expert: its architecture, its functions. Saved weights are read over it."""
    words = getattr(expert, "words", None)
    return Given(
        module=getattr(expert, "module", None),
        function=getattr(expert, "function", None),
        preprocess=getattr(expert, "preprocess", None),
        words=words if callable(words) else None,
    )
