"""A merge from recipe to folder: resolve, plan, run, record. The work on tensors is in `execute`."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model_fusion.checkpoint import card, lineage
from model_fusion.checkpoint.ahead import Ahead
from model_fusion.checkpoint.output_folder import check_target
from model_fusion.checkpoint.reader import Checkpoint, open_model
from model_fusion.checkpoint.small_files import small_files
from model_fusion.checkpoint.sources import resolve
from model_fusion.checkpoint.statistics import open_statistics
from model_fusion.checkpoint.views import Planned
from model_fusion.checkpoint.writer import CheckpointWriter
from model_fusion.errors import InputError
from model_fusion.merge import plan as planning
from model_fusion.merge.device import check_device
from model_fusion.merge.execute import Run
from model_fusion.merge.in_memory import Held, hold
from model_fusion.merge.methods import get
from model_fusion.merge.parameters import check_parameters, defaults
from model_fusion.merge.plan import MergePlan, Method
from model_fusion.merge.prepare import prepare
from model_fusion.merge.stages import Made, Stages, parents, through
from model_fusion.recipe.merge import MergeRecipe, load

_SMALL = 64 << 20


@dataclass(frozen=True)
class _Choices:
    """What flags say about the inputs."""

    folder: Path | None
    trust_remote_code: bool
    fill_missing: str | None
    opened: dict[str, Checkpoint] | None = None

    def open(self, name: str) -> Checkpoint:
        if self.opened is None:
            return open_model(resolve(name, self.folder))
        if name not in self.opened:
            self.opened[name] = open_model(resolve(name, self.folder))
        return self.opened[name]


def plan(
    recipe: Path | MergeRecipe,
    *,
    trust_remote_code: bool = False,
    fill_missing: str | None = None,
    method: Method | None = None,
    relative_to: Path | None = None,
    opened: dict[str, Checkpoint] | None = None,
) -> MergePlan:
    """Resolve and check everything; writes nothing. `method` replaces the registry's entry; `relative_to` is where the
    paths of a parsed recipe start; `opened` keeps the models open for a later call."""
    folder = recipe.parent if isinstance(recipe, Path) else relative_to
    parsed = load(recipe) if isinstance(recipe, Path) else recipe
    choices = _Choices(folder, trust_remote_code, fill_missing, opened)
    stages: dict[str, MergePlan] = {}
    named: dict[str, Checkpoint] = {}
    for name in parsed.order():
        stages[name] = work = _plan(parsed.merges[name], choices, named)
        named[name] = Planned(name, [item.spec for item in work.outputs], work.config, work.files)
    return replace(_plan(parsed, choices, named, method), stages=stages)


def _plan(
    recipe: MergeRecipe, choices: _Choices, named: Mapping[str, Checkpoint], method: Method | None = None
) -> MergePlan:
    """One merge; `named` are the merges that its models may mean."""
    if method is None:
        method = get(recipe.merge_method)
    check_parameters(recipe, method)
    names = recipe.model_names()
    checkpoints = {name: named.get(name) or choices.open(name) for name in names}
    data = {text: open_statistics(text, choices.folder) for text in recipe.statistics()}
    spec = recipe.tokenizer_spec()
    other = None
    if spec is not None and spec.source not in ("base", "union", *checkpoints):
        try:
            place = resolve(spec.source, choices.folder).folder
        except InputError as error:
            raise InputError(f"tokenizer_source is none of base, union or a model: {error}") from error
        other = {name: (place / name).read_bytes() for name in small_files(place)}
    ready = prepare(recipe, checkpoints, other, choices.trust_remote_code)
    return planning.build(recipe, method, ready, choices.fill_missing, data)


@dataclass(frozen=True)
class _Flags:
    resume: bool
    threads: int
    shard_size: int
    allow_nan: bool
    device: str
    command: str
    ahead: Ahead | None
    notes: Sequence[str]
    files: Mapping[str, bytes]


def merge_in_memory(
    recipe: MergeRecipe,
    relative_to: Path | None,
    opened: dict[str, Checkpoint],
    *,
    threads: int = 0,
    device: str = "cpu",
    trust_remote_code: bool = False,
    fill_missing: str | None = None,
) -> Held:
    """Merge and write nothing. `opened` keeps the models open from one call to the next. Raises `InputError`."""
    choices = _Choices(relative_to, trust_remote_code, fill_missing, opened)
    named: dict[str, Checkpoint] = {}
    count = threads or torch.get_num_threads()
    for name in recipe.order():
        named[name] = hold(name, _plan(recipe.merges[name], choices, named), count, device)
    return hold("merged", _plan(recipe, choices, named), count, device)


def merge(
    recipe: Path | MergeRecipe,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    threads: int = 0,
    shard_size: int = 5 * 10**9,
    allow_nan: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
    fill_missing: str | None = None,
    method: Method | None = None,
    ahead: Ahead | None = None,
    relative_to: Path | None = None,
    notes: Sequence[str] = (),
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Merge as the recipe says and put an ordinary checkpoint at `output`; returns that folder.

    `threads` 0 means one per core; the bytes written do not depend on them. `device` is where tensors are combined.
    `fill_missing`: the model (or `base`) that gives the tensors which another lacks. Raises `InputError` (nothing is
    left behind) or `KeyboardInterrupt` (a hidden partial folder stays for `resume`). `ahead` may hold hashes of inputs
    that were taken while this module was imported. `relative_to`: where the paths of a parsed recipe start. `notes`
    and `files` (name → content) join the lineage and the folder.
    """
    if shard_size < 1 or threads < 0:
        raise InputError(f"shard size {shard_size} and threads {threads}: give positive numbers")
    check_device(device)
    command = "model-fusion merge recipe.yml -o out"
    command += f" --device {device}" if device != "cpu" else ""
    command += f" --fill-missing {fill_missing}" if fill_missing else ""
    command += " --trust-remote-code" if trust_remote_code else ""
    command += " --allow-nan" if allow_nan else ""
    flags = _Flags(
        resume, threads or torch.get_num_threads(), shard_size, allow_nan, device, command, ahead, notes, files or {}
    )
    folder = recipe.parent if isinstance(recipe, Path) else relative_to
    work = plan(
        recipe,
        trust_remote_code=trust_remote_code,
        fill_missing=fill_missing,
        method=method,
        relative_to=folder,
    )
    check_target(output, inputs(work), overwrite=overwrite)
    if not work.stages:
        _write(work, output, flags, {})
        return output
    choices = _Choices(folder, trust_remote_code, fill_missing)
    made: dict[str, Made] = {}
    inner = replace(flags, notes=(), files={})
    with Stages(output, resume=resume) as place:
        for number, name in enumerate(work.stages):
            # planned again: what was a promise is now a folder
            stage = _plan(work.recipe.merges[name], choices, _checkpoints(made))
            whole = place.made(name, number, _key(stage, device), partial(_write, stage, flags=inner, made=dict(made)))
            made[name] = Made(whole, parents(stage.every(), made))
        _write(_plan(work.recipe, choices, _checkpoints(made), method), output, flags, made)
    return output


def _checkpoints(made: Mapping[str, Made]) -> dict[str, Checkpoint]:
    return {name: stage.checkpoint for name, stage in made.items()}


def inputs(work: MergePlan) -> list[Path]:
    """Folders and files that are read, of all stages."""
    every = [c for part in (work, *work.stages.values()) for c in part.every().values()]
    sources = [c.source for c in every if c.source.spec not in work.stages]
    return [place for source in sources for place in source.places]


def _write(work: MergePlan, output: Path, flags: _Flags, made: Mapping[str, Made]) -> None:
    """Run one plan. `made` are the named merges that exist by now; the lineage looks through them."""
    # largest first, so that no thread is left alone with a big tensor at the end
    order = sorted(work.outputs, key=lambda item: -item.spec.nbytes)
    specs = [item.spec for item in work.outputs]
    key = _key(work, flags.device)
    with CheckpointWriter(output, specs, key=key, shard_size=flags.shard_size, resume=flags.resume) as writer:
        run = Run(work, writer, flags.allow_nan, flags.device, flags.ahead)
        try:
            run.all(order, flags.threads)
        except torch.OutOfMemoryError as error:
            raise InputError(f"{flags.device} has too little memory: give fewer --threads, or --device cpu") from error
        for text in run.warnings():
            warnings.warn(f"{work.method.name}: {text}", stacklevel=2)
        files = {**_files(work), **flags.files}
        files[lineage.NAME] = lineage.build(
            "merge",
            work.method.name,
            work.recipe.model_dump(exclude_none=True, mode="json"),
            parents(work.every(), made),
            specs,
            writer.done,
            through(writer.inputs_of, made),
            files,
            command=flags.command,
            defaults=defaults(work.method),
            seed=work.recipe.seed,
            notes=[*work.notes(), *flags.notes],
        )
        files[card.NAME] = card.build(files[lineage.NAME])
        writer.finish(files)


def _files(work: MergePlan) -> dict[str, bytes]:
    files = dict(work.files)
    if work.config:
        files["config.json"] = json.dumps(work.config, indent=2, ensure_ascii=False).encode() + b"\n"
    return files


def _key(work: MergePlan, device: str) -> str:
    """Identity of recipe and inputs, and of what may change a last bit: the program and the device."""
    digest = hashlib.sha256(work.recipe.model_dump_json().encode())
    digest.update(repr((lineage.own_version(), torch.__version__, device)).encode())
    digest.update(repr([(item.inputs, item.base, item.data) for item in work.outputs]).encode())
    digest.update(fingerprint(work.every()).encode())
    return digest.hexdigest()


def fingerprint(checkpoints: Mapping[str, Checkpoint]) -> str:
    """Identity of models on disk: small files by content, large ones by size, time, inode, start."""
    digest = hashlib.sha256()
    for name, checkpoint in checkpoints.items():
        digest.update(name.encode())
        places = checkpoint.source.places
        for file in [p for place in places for p in ([place] if place.is_file() else sorted(place.iterdir()))]:
            if not file.is_file():
                continue
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
