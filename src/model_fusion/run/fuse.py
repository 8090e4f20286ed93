"""`model_fusion.fuse(recipe, output)`: check, train, save, say how well it went.

While training, its state lies beside the output in `.<output>.training/`; the output appears when complete.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from model_fusion.errors import InputError, IntegrityError
from model_fusion.fuse import saving
from model_fusion.fuse.align import train_by
from model_fusion.fuse.model import FusedModel
from model_fusion.fuse.precision import fastest_dtype
from model_fusion.recipe import fuse as recipes
from model_fusion.recipe.fuse import FuseRecipe
from model_fusion.run.plan import Plan, make_plan
from model_fusion.training.loop import History

STATE, RUN = "state.pt", "run.json"


@dataclass(frozen=True)
class FuseResult:
    """A finished fusion: where it lies, and its training. `history` is None for a bridge without training;
    `loss` and `agreement` are those of the kept parameters on the validation examples. `written` is false in all
    processes but the first of several."""

    folder: Path
    bridge: str
    history: History | None
    loss: float | None = None
    agreement: float | None = None
    written: bool = True

    def __str__(self) -> str:
        if self.history is None:
            return f"wrote {self.folder}: the {self.bridge} bridge has nothing to train"
        steps, why = len(self.history.losses), self.history.stopped or "all steps done"
        return (
            f"wrote {self.folder}: {self.bridge}, validation loss {self.loss:.4f}, agreement {self.agreement:.3f}, "
            f"kept step {self.history.best_step} of {steps} ({why}), {self.history.seconds:.1f} s"
        )


def fuse(
    recipe: str | Path | Mapping[str, Any] | FuseRecipe,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    given: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> FuseResult:
    """Train the bridge that `recipe` describes and save the fused model in `output`.

    recipe: a YAML file, the same as a mapping, or a `FuseRecipe`. resume: continue an interrupted run of the same
    recipe. overwrite: replace a fusion in `output` and forget an interrupted run. given: live parts of experts
    that no file holds, by name. Everything is checked before training starts; raises InputError or IntegrityError.

    Under `torchrun` every process trains and the first one writes.
    """
    target = Path(output)
    work = target.absolute().parent / f".{target.absolute().name}.training"
    writes = int(os.environ.get("RANK", "0")) == 0
    if writes:
        check_output(target, work, resume=resume, overwrite=overwrite)
    plan = make_plan(_read(recipe), given=given)
    if plan.recipe.dtype == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("dtype: give one in the recipe; several processes could each measure another as the fastest")
    if overwrite and not resume and writes:
        shutil.rmtree(work, ignore_errors=True)
    with _nothing_left(target, work) if writes else nullcontext():
        dtype = _begin(work, plan) if writes else plan.recipe.dtype
        fused = FusedModel.build(
            plan.recipe.base, experts=plan.experts, bridge=plan.bridge, dtype=dtype, seed=plan.recipe.seed
        )
        fused.task = {**(plan.task or {}), "training": _training(plan)}
        history = _train(fused, plan, work / STATE, progress) if fused.bridge.trainable else None
        if writes:
            fused.save_pretrained(target)
            shutil.rmtree(work)
    if history is None:
        return FuseResult(target, plan.bridge.kind, None, written=writes)
    _, loss, score = next(v for v in history.validations if v[0] == history.best_step)
    return FuseResult(target, plan.bridge.kind, history, loss, score, writes)


def check_output(target: Path, work: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise InputError where `target` may not be written, or an interrupted run has to be decided on first."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        if not (target / saving.CONFIG).is_file():
            raise InputError(f"{target}: exists and holds something else than a fusion; name another folder")
        if not overwrite:
            raise InputError(f"{target}: exists already; name another folder, or replace it with --overwrite")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{target}: {above} cannot be written to; name another folder")
    if work.exists() and not (resume or overwrite):
        raise InputError(
            f"{target}: an interrupted run lies in {work.name}; continue it with --resume, or start afresh with "
            "--overwrite"
        )


def _read(recipe: str | Path | Mapping[str, Any] | FuseRecipe) -> FuseRecipe:
    if isinstance(recipe, FuseRecipe):
        return recipe
    return recipes.load(Path(recipe)) if isinstance(recipe, str | Path) else recipes.parse(dict(recipe))


def _training(plan: Plan) -> dict[str, Any]:
    """What training is told beside the examples, and its objective; an audit trains again in the same way."""
    settings = dataclasses.asdict(plan.settings)
    if plan.recipe.objective == "align":
        own = () if plan.task else (example.prompt for example in plan.train if example.prompt)
        return {**settings, "objective": "align", "prompts": list(dict.fromkeys(own))}
    return {**settings, "keep_language": plan.recipe.keep_language}


def _train(fused: FusedModel, plan: Plan, state: Path, progress: bool) -> History:
    common: dict[str, Any] = {"resume": state, "keep": True, "progress": progress}
    try:
        return train_by(fused, plan.train, plan.validation, _training(plan), **common)
    except KeyboardInterrupt:
        print("the training so far is kept; continue it with --resume", file=sys.stderr)
        raise


def _begin(work: Path, plan: Plan) -> str:
    """Note in `work` which run this is, or check that an interrupted one is the same; the dtype to compute in.

    "auto" is measured once: a resumed run goes on in the dtype it started with."""
    recipe = plan.recipe.model_dump(mode="json")
    key = hashlib.sha256(json.dumps([recipe, plan.base.hash], sort_keys=True).encode()).hexdigest()
    note = work / RUN
    if note.is_file():
        kept = json.loads(note.read_text())
        if kept.get("key") != key:
            raise IntegrityError(
                f"{work.name}: belongs to a run with another recipe or base LLM; start afresh with --overwrite"
            )
        return str(kept["dtype"])
    wanted = plan.recipe.dtype
    dtype = str(fastest_dtype()).removeprefix("torch.") if wanted == "auto" else wanted
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"key": key, "dtype": dtype}) + "\n")
    return dtype


@contextmanager
def _nothing_left(target: Path, work: Path) -> Iterator[None]:
    """Take `work` away when a run fails without a state to resume; tell of a full disk in one line."""
    try:
        yield
    except BaseException as error:
        kept = (work / STATE).is_file()
        if not kept:
            shutil.rmtree(work, ignore_errors=True)
        if _disk_full(error):
            advice = "continue with --resume" if kept else "start again"
            raise InputError(f"{target}: the disk is full; free some space, then {advice}") from error
        raise


def _disk_full(error: BaseException) -> bool:
    # safetensors writes in Rust and tells of the operating system's error in words only.
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or (
        isinstance(error, SafetensorError) and any(f"os error {number}" in str(error) for number in full)
    )
