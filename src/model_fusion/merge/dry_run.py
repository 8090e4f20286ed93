"""What a merge would do, and about how long it would take: some tensors are really merged, their bytes thrown away."""

import hashlib
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model_fusion.checkpoint.output_folder import check_target
from model_fusion.checkpoint.views import Planned
from model_fusion.checkpoint.writer import as_bytes
from model_fusion.merge import engine
from model_fusion.merge.device import check_device
from model_fusion.merge.execute import Run
from model_fusion.merge.global_trim import trimmed_together
from model_fusion.merge.plan import Input, MergePlan, Output

BUDGET = 3.0
"""Seconds to spend on one merge's sample."""


@dataclass(frozen=True)
class Forecast:
    """One merge. seconds: estimated from `sampled` tensors; None where `unknown` says why not."""

    name: str
    method: str
    models: list[str]
    base: str | None
    tensors: int
    read: int
    written: int
    sampled: int
    seconds: float | None
    unknown: str = ""


@dataclass
class DryRun:
    """`merges`: intermediate ones first. free: bytes on the output's disk."""

    merges: list[Forecast]
    threads: int
    free: int
    warnings: list[str] = field(default_factory=list)


def dry_run(
    recipe: Path,
    output: Path,
    *,
    overwrite: bool = False,
    threads: int = 0,
    device: str = "cpu",
    fill_missing: str | None = None,
    trust_remote_code: bool = False,
    allow_nan: bool = False,
) -> DryRun:
    """Check everything that `engine.merge` checks before it works; writes nothing."""
    check_device(device)
    count = threads or torch.get_num_threads()
    work = engine.plan(recipe, fill_missing=fill_missing, trust_remote_code=trust_remote_code)
    check_target(output, engine.inputs(work), overwrite=overwrite)
    result = DryRun([], count, shutil.disk_usage(output.resolve().parent).free)
    for name, stage in [*work.stages.items(), (work.recipe.name or "output", work)]:
        result.merges.append(_forecast(name, stage, _Way(count, device, allow_nan)))
    needed = sum(merge.written for merge in result.merges)
    if needed > result.free:
        result.warnings.append(f"{needed / 1e9:.2f} GB to write, {result.free / 1e9:.2f} GB free at {output.parent}")
    return result


@dataclass(frozen=True)
class _Way:
    """How tensors are merged."""

    threads: int
    device: str
    allow_nan: bool


def _forecast(name: str, work: MergePlan, way: _Way) -> Forecast:
    unknown = _unknown(work)
    seconds, sampled = (None, 0) if unknown else _time(work, way)
    every = work.every()
    return Forecast(
        name=name,
        method=work.method.name,
        models=list(work.checkpoints),
        base=work.recipe.base_model,
        tensors=len(work.outputs),
        read=sum(every[source.model].spec(source.tensor).nbytes for o in work.outputs for source in _reads(o)),
        written=sum(item.spec.nbytes for item in work.outputs),
        sampled=sampled,
        seconds=seconds,
        unknown=unknown,
    )


def _unknown(work: MergePlan) -> str:
    """Why a sample of tensors says nothing of the time."""
    if any(isinstance(checkpoint, Planned) for checkpoint in work.checkpoints.values()):
        return "its inputs do not exist yet"
    return "trim: global looks at all tensors before it merges one" if trimmed_together(work) else ""


def _reads(item: Output) -> list[Input]:
    return [*item.inputs, *([item.base] if item.base else []), *item.data]


class _Thrown:
    """Takes what a writer takes and hashes it as a writer does."""

    def __init__(self) -> None:
        self.done: dict[str, str] = {}

    def write_parts(self, name: str, parts: Iterable[Tensor], inputs: Mapping[str, str] | None = None) -> str:
        digest = hashlib.sha256()
        for part in parts:
            digest.update(as_bytes(part))
        return digest.hexdigest()


def _time(work: MergePlan, way: _Way) -> tuple[float, int]:
    """Seconds for all tensors, and how many were merged to find out.

    Tensors of one shape cost alike. Of a shape, one tensor a thread is merged at once, so the threads compete as they
    will. The shape that holds the most bytes is always measured; the others, small ones first, as far as the budget
    goes, and beyond it they are reckoned by the bytes at that shape's rate.
    """
    threads = way.threads
    shapes: dict[tuple[object, ...], list[Output]] = {}
    for item in work.outputs:
        shapes.setdefault((item.spec.shape, item.spec.dtype, item.copied), []).append(item)
    groups = sorted(shapes.values(), key=lambda items: items[0].spec.nbytes)
    if not groups:
        return 0.0, 0
    _merge_some(work, groups[0][:1], way)  # the first call of anything costs more: not counted
    main = max(groups, key=lambda items: items[0].spec.nbytes * len(items))
    rate, total, spent, sampled = 0.0, 0.0, 0.0, 0
    for group in [main, *(other for other in groups if other is not main)]:
        size, chosen = group[0].spec.nbytes, group[:threads]
        if group is not main and spent + rate * size * threads > BUDGET:
            total += rate * size * len(group)
            continue
        took = _merge_some(work, chosen, way)
        spent, sampled = spent + took, sampled + len(chosen)
        # a lone tensor shares the threads with other shapes in the merge
        each = took / threads if len(chosen) < threads else took / len(chosen)
        total += each * len(group)
        rate = rate or each / max(size, 1)
    return total, sampled


def _merge_some(work: MergePlan, chosen: list[Output], way: _Way) -> float:
    start = time.perf_counter()
    Run(work, _Thrown(), way.allow_nan, way.device).all(chosen, way.threads)
    return time.perf_counter() - start
