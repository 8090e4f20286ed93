"""Streams a plan's output tensors through a method: threads over tensors, float32, hashes in cache.

Knows no YAML key and no tensor name. Memory: a thread holds one output tensor and, in float32, at most its
inputs (cache-sized chunks of them where the method can be cut; methods cut themselves).
"""

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_fusion.checkpoint import card, lineage
from model_fusion.checkpoint.output_folder import check_target
from model_fusion.checkpoint.reader import Checkpoint, open_checkpoint
from model_fusion.checkpoint.small_files import small_files
from model_fusion.checkpoint.sources import resolve
from model_fusion.checkpoint.writer import CheckpointWriter, as_bytes
from model_fusion.errors import InputError
from model_fusion.merge import plan as planning
from model_fusion.merge.methods import Key, get
from model_fusion.merge.plan import Input, MergePlan, Method, Output
from model_fusion.merge.prepare import prepare
from model_fusion.recipe.merge import MergeRecipe, load

_CHUNK = 1 << 22
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
        _Run(work, writer, allow_nan).all(order, threads or torch.get_num_threads())
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


class _Run:
    """One execution: shared by its worker threads."""

    def __init__(self, work: MergePlan, writer: CheckpointWriter, allow_nan: bool) -> None:
        self._work, self._writer, self._allow_nan = work, writer, allow_nan
        self._bad: list[str] = []
        self._stop = threading.Event()

    def all(self, order: list[Output], threads: int) -> None:
        """Make every tensor that is not yet done; the first error stops the rest."""
        todo = [item for item in order if item.spec.name not in self._writer.done]
        # one intra-op thread each: tensors are the parallelism, and sums do not depend on the machine's cores
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            for future in [pool.submit(self._one, item) for item in todo]:
                future.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
        if self._bad:
            found = sorted(set(self._bad))
            more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
            raise InputError(f"NaN or Inf in {'; '.join(found[:20])}{more} (--allow-nan merges them anyway)")

    def _one(self, item: Output) -> None:
        if self._stop.is_set():
            return
        with torch.inference_mode():
            sources = [*item.inputs, *([item.base] if item.base else [])]
            tensors = [self._checkpoint(source).read(source.tensor) for source in sources]
            hashes = {
                f"{source.model}:{label}": hashlib.sha256(as_bytes(part)).hexdigest()
                for source in sources
                for label, part in self._checkpoint(source).stored(source.tensor).items()
            }
            if item.copied:
                result = tensors[0].to(item.spec.dtype)
            else:
                if not self._allow_nan and self._broken(sources, tensors):
                    return
                result = self._combine(item, tensors)
        self._writer.write(item.spec.name, result, hashes)

    def _checkpoint(self, source: Input) -> Checkpoint:
        return self._work.checkpoints[source.model]

    def _broken(self, sources: list[Input], tensors: list[Tensor]) -> bool:
        found = False
        for source, tensor in zip(sources, tensors, strict=True):
            # a finite sum has finite terms: the exact test runs only where the cheap one fails
            flat = tensor.reshape(-1)
            if not all(_finite(part) for part in torch.split(flat, _CHUNK)):
                file = self._checkpoint(source).file_of(source.tensor)
                self._bad.append(f"{file}: {source.tensor}")
                found = True
        return found

    def _combine(self, item: Output, tensors: list[Tensor]) -> Tensor:
        models, base = tensors[: len(item.inputs)], tensors[-1] if item.base else None
        key = Key(self._work.recipe.seed, item.spec.name)
        return self._rounded(item, self._work.method.run(models, base, item.model_params, item.params, key))

    def _rounded(self, item: Output, value: Tensor) -> Tensor:
        rounded = value.to(item.spec.dtype)
        if not self._allow_nan and not _finite(rounded):
            kind = str(item.spec.dtype).removeprefix("torch.")
            raise InputError(
                f"{self._work.method.name} made NaN or Inf in {item.spec.name!r} ({kind}): check weights "
                "and dtype, or pass --allow-nan"
            )
        return rounded


def _finite(tensor: Tensor) -> bool:
    flat = tensor.reshape(-1)
    return bool(torch.isfinite(flat.sum(dtype=torch.float32))) or bool(torch.isfinite(flat).all())


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
