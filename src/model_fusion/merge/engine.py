"""A merge from recipe to folder: resolve, plan, run, record. The work on tensors is in `execute`."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model_fusion.checkpoint import card, lineage
from model_fusion.checkpoint.output_folder import check_target
from model_fusion.checkpoint.reader import Checkpoint, open_checkpoint
from model_fusion.checkpoint.small_files import small_files
from model_fusion.checkpoint.sources import resolve
from model_fusion.checkpoint.views import Planned
from model_fusion.checkpoint.writer import CheckpointWriter
from model_fusion.errors import InputError
from model_fusion.merge import plan as planning
from model_fusion.merge.execute import Run
from model_fusion.merge.methods import get
from model_fusion.merge.plan import MergePlan, Method
from model_fusion.merge.prepare import prepare
from model_fusion.merge.stages import Made, Stages, parents, through
from model_fusion.recipe.merge import MergeRecipe, load

_SMALL = 64 << 20


def plan(recipe: Path | MergeRecipe, *, method: Method | None = None) -> MergePlan:
    """Resolve and check everything; writes nothing. `method` replaces the registry's entry."""
    folder = recipe.parent if isinstance(recipe, Path) else None
    parsed = load(recipe) if isinstance(recipe, Path) else recipe
    stages: dict[str, MergePlan] = {}
    named: dict[str, Checkpoint] = {}
    for name in parsed.order():
        stages[name] = work = _plan(parsed.merges[name], folder, named)
        named[name] = Planned(name, [item.spec for item in work.outputs], work.config, work.files)
    return replace(_plan(parsed, folder, named, method), stages=stages)


def _plan(
    recipe: MergeRecipe, folder: Path | None, named: Mapping[str, Checkpoint], method: Method | None = None
) -> MergePlan:
    """One merge; `named` are the merges that its models may mean."""
    if method is None:
        method = get(recipe.merge_method)
    planning.check_parameters(recipe, method)
    names = recipe.model_names()
    checkpoints = {name: named.get(name) or open_checkpoint(resolve(name, folder)) for name in names}
    spec = recipe.tokenizer_spec()
    other = None
    if spec is not None and spec.source not in ("base", "union", *checkpoints):
        try:
            place = resolve(spec.source, folder).folder
        except InputError as error:
            raise InputError(f"tokenizer_source is none of base, union or a model: {error}") from error
        other = {name: (place / name).read_bytes() for name in small_files(place)}
    return planning.build(recipe, method, prepare(recipe, checkpoints, other))


@dataclass(frozen=True)
class _Flags:
    resume: bool
    threads: int
    shard_size: int
    allow_nan: bool


def merge(
    recipe: Path | MergeRecipe,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    threads: int = 0,
    shard_size: int = 5 * 10**9,
    allow_nan: bool = False,
    method: Method | None = None,
) -> Path:
    """Merge as the recipe says and put an ordinary checkpoint at `output`; returns that folder.

    `threads` 0 means one per core; the bytes written do not depend on them. Raises `InputError` (nothing is
    left behind) or `KeyboardInterrupt` (a hidden partial folder stays for `resume`).
    """
    if shard_size < 1 or threads < 0:
        raise InputError(f"shard size {shard_size} and threads {threads}: give positive numbers")
    flags = _Flags(resume, threads or torch.get_num_threads(), shard_size, allow_nan)
    work = plan(recipe, method=method)
    check_target(output, _inputs(work), overwrite=overwrite)
    if not work.stages:
        _write(work, output, flags, {})
        return output
    folder = recipe.parent if isinstance(recipe, Path) else None
    made: dict[str, Made] = {}
    with Stages(output, resume=resume) as place:
        for number, name in enumerate(work.stages):
            # planned again: what was a promise is now a folder
            stage = _plan(work.recipe.merges[name], folder, _checkpoints(made))
            whole = place.made(name, number, _key(stage), partial(_write, stage, flags=flags, made=dict(made)))
            made[name] = Made(whole, parents(stage.checkpoints, made))
        _write(_plan(work.recipe, folder, _checkpoints(made), method), output, flags, made)
    return output


def _checkpoints(made: Mapping[str, Made]) -> dict[str, Checkpoint]:
    return {name: stage.checkpoint for name, stage in made.items()}


def _inputs(work: MergePlan) -> list[Path]:
    """Folders that are read, of all stages."""
    every = [c for part in (work, *work.stages.values()) for c in part.checkpoints.values()]
    sources = [c.source for c in every if c.source.spec not in work.stages]
    return [place for source in sources for place in (source.folder, source.adapter) if place is not None]


def _write(work: MergePlan, output: Path, flags: _Flags, made: Mapping[str, Made]) -> None:
    """Run one plan. `made` are the named merges that exist by now; the lineage looks through them."""
    # largest first, so that no thread is left alone with a big tensor at the end
    order = sorted(work.outputs, key=lambda item: -item.spec.nbytes)
    specs = [item.spec for item in work.outputs]
    key = _key(work)
    with CheckpointWriter(output, specs, key=key, shard_size=flags.shard_size, resume=flags.resume) as writer:
        Run(work, writer, flags.allow_nan).all(order, flags.threads)
        files = _files(work)
        files[lineage.NAME] = lineage.build(
            "merge",
            work.method.name,
            work.recipe.model_dump(exclude_none=True, mode="json"),
            parents(work.checkpoints, made),
            specs,
            writer.done,
            through(writer.inputs_of, made),
            files,
            command="model-fusion merge recipe.yml -o out",
            defaults=planning.defaults(work.method),
            seed=work.recipe.seed,
        )
        files[card.NAME] = card.build(files[lineage.NAME])
        writer.finish(files)


def _files(work: MergePlan) -> dict[str, bytes]:
    files = dict(work.files)
    if work.config:
        files["config.json"] = json.dumps(work.config, indent=2, ensure_ascii=False).encode() + b"\n"
    return files


def _key(work: MergePlan) -> str:
    """Identity of recipe and inputs: small files by content, large ones by size, time, inode, start."""
    digest = hashlib.sha256(work.recipe.model_dump_json().encode())
    for name, checkpoint in work.checkpoints.items():
        digest.update(name.encode())
        folders = [checkpoint.folder, *([checkpoint.source.adapter] if checkpoint.source.adapter else [])]
        for file in [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file()]:
            stat = file.stat()
            whole = stat.st_size <= _SMALL
            facts: tuple[Any, ...] = (
                file.name,
                stat.st_size,
                *(() if whole else (stat.st_mtime_ns, stat.st_ino)),
            )
            digest.update(repr(facts).encode())
            with file.open("rb") as handle:
                digest.update(handle.read(_SMALL if whole else 1 << 20))
    return digest.hexdigest()
