"""A merge from recipe to folder: resolve, plan, run, record. The work on tensors is in `execute`."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from model_fusion.checkpoint import card, lineage
from model_fusion.checkpoint.output_folder import check_target
from model_fusion.checkpoint.reader import open_checkpoint
from model_fusion.checkpoint.small_files import small_files
from model_fusion.checkpoint.sources import resolve
from model_fusion.checkpoint.writer import CheckpointWriter
from model_fusion.errors import InputError
from model_fusion.merge import plan as planning
from model_fusion.merge.execute import Run
from model_fusion.merge.methods import get
from model_fusion.merge.plan import MergePlan, Method
from model_fusion.merge.prepare import prepare
from model_fusion.recipe.merge import MergeRecipe, load

_SMALL = 64 << 20


def plan(recipe: Path | MergeRecipe, *, method: Method | None = None) -> MergePlan:
    """Resolve and check everything; writes nothing. `method` replaces the registry's entry."""
    folder = recipe.parent if isinstance(recipe, Path) else None
    parsed = load(recipe) if isinstance(recipe, Path) else recipe
    if method is None:
        method = get(parsed.merge_method)
    planning.check_parameters(parsed, method)
    checkpoints = {name: open_checkpoint(resolve(name, folder)) for name in parsed.model_names()}
    spec = parsed.tokenizer_spec()
    other = None
    if spec is not None and spec.source not in ("base", "union", *checkpoints):
        try:
            place = resolve(spec.source, folder).folder
        except InputError as error:
            raise InputError(f"tokenizer_source is none of base, union or a model: {error}") from error
        other = {name: (place / name).read_bytes() for name in small_files(place)}
    return planning.build(parsed, method, prepare(parsed, checkpoints, other))


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
    work = plan(recipe, method=method)
    inputs = [c.folder for c in work.checkpoints.values()]
    inputs += [c.source.adapter for c in work.checkpoints.values() if c.source.adapter]
    check_target(output, inputs, overwrite=overwrite)
    # largest first, so that no thread is left alone with a big tensor at the end
    order = sorted(work.outputs, key=lambda item: -item.spec.nbytes)
    specs = [item.spec for item in work.outputs]
    with CheckpointWriter(output, specs, key=_key(work), shard_size=shard_size, resume=resume) as writer:
        Run(work, writer, allow_nan).all(order, threads or torch.get_num_threads())
        files = _files(work)
        files[lineage.NAME] = lineage.build(
            "merge",
            work.method.name,
            work.recipe.model_dump(exclude_none=True, mode="json"),
            list(work.checkpoints.values()),
            specs,
            writer.done,
            writer.inputs_of,
            files,
            command="model-fusion merge recipe.yml -o out",
            defaults=planning.defaults(work.method),
            seed=work.recipe.seed,
        )
        files[card.NAME] = card.build(files[lineage.NAME])
        writer.finish(files)
    return output


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
