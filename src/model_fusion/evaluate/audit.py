"""An audit: every control, over seeds, beside the fusion of the same seed. Cells are kept as they finish."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from model_fusion.errors import InputError
from model_fusion.evaluate import speech
from model_fusion.evaluate.controls import CONTROLS, Control, NotApplicable
from model_fusion.evaluate.journal import Journal, finished
from model_fusion.evaluate.machine import machine, versions
from model_fusion.evaluate.saved import load_for_audit
from model_fusion.evaluate.summary import skill_recovered, summarise
from model_fusion.evaluate.tasks.base import Task
from model_fusion.evaluate.trials import Trials
from model_fusion.fuse.fit import Example
from model_fusion.fuse.model import FusedModel
from model_fusion.report import json_file as json_files

FEW = 32
"""The few-label comparison of controls 4 and 5, validation included."""
CURVE = (8, 16, 32, 64, 128)
ENOUGH_SEEDS = 5
JOURNAL = "audit.journal.jsonl"


@dataclass(frozen=True)
class AuditSettings:
    """`seeds` trainings of everything that trains; `curve` label counts; `controls` keys to run (None: all)."""

    seeds: int = ENOUGH_SEEDS
    curve: tuple[int, ...] = CURVE
    quick: bool = False
    controls: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise InputError(f"seeds must be at least 1, got {self.seeds}")
        unknown = sorted(set(self.controls or ()) - set(CONTROLS))
        if unknown:
            raise InputError(f"unknown control {unknown[0]!r}: one of {', '.join(CONTROLS)}")

    @classmethod
    def short(cls, seeds: int = 2) -> AuditSettings:
        """`--quick`: fewer seeds and one few-label point. It looks for gross faults and proves nothing."""
        return cls(seeds, (FEW,), quick=True)


@dataclass(frozen=True)
class Cell:
    """One run of one control: `seed` 0 where it has none, `labels` None for all of them."""

    control: Control
    seed: int
    labels: int | None

    @property
    def key(self) -> str:
        return f"{self.control.key}/{self.seed}/{self.labels or 'all'}"


def cells(settings: AuditSettings, label_count: int) -> list[Cell]:
    """Every cell in the order of running: what needs no training, then seed by seed, the few-label curve last."""
    chosen = [c for key, c in CONTROLS.items() if settings.controls is None or key in settings.controls]
    found = [Cell(control, 0, None) for control in chosen if not control.seeded]
    few = [count for count in settings.curve if count < label_count]
    for seed in range(settings.seeds):
        found += [Cell(control, seed, None) for control in chosen if control.seeded]
        found += [Cell(control, seed, FEW) for control in chosen if control.few and FEW in few]
    for seed in range(settings.seeds):
        found += [Cell(control, seed, count) for control in chosen if control.curve for count in few if count != FEW]
    return found


def audit(
    fusion: FusedModel | str | Path,
    *,
    task: Task | str | None = None,
    examples: Sequence[Example] | str | Path | None = None,
    seeds: int | None = None,
    quick: bool = False,
    json_file: str | Path | None = None,
    html_file: str | Path | None = None,
    journal: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    given: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Audit a fusion (a model, or a saved folder) on a task or on your own examples; returns the report.

    Its `claims` say in words what the numbers support. `seeds`: trainings of what trains (default 5, `quick` 2).
    Finished cells are kept in `journal` (default: audit.journal.jsonl in the saved folder, or beside the JSON file),
    from which `resume` goes on; without it, they are only replaced with `overwrite`. given, allow_pickle: as in
    `FusedModel.from_pretrained`. Raises InputError, IntegrityError, and MissingDependencyError before the work begins.
    """
    from model_fusion.report.claims import claims
    from model_fusion.report.page import page
    from model_fusion.report.plots import need_matplotlib

    for flag, file in (("--json", json_file), ("--html", html_file)):
        json_files.check(None if file is None else Path(file), flag)
    if html_file is not None:
        need_matplotlib()
    settings = AuditSettings.short(seeds or 2) if quick else AuditSettings(ENOUGH_SEEDS if seeds is None else seeds)
    folder = None if isinstance(fusion, FusedModel) else Path(fusion)
    fused, chosen = load_for_audit(fusion, task, examples, given, allow_pickle=allow_pickle)
    if journal is None:
        if folder is None and json_file is None:
            raise InputError("name a journal file: this model is not in a folder where finished cells could be kept")
        journal = folder / JOURNAL if folder else Path(f"{json_file}.journal.jsonl")
    if (done := finished(Path(journal))) and not (resume or overwrite):
        raise InputError(
            f"{journal}: holds {done} finished cells of an audit: go on with --resume, or start afresh with --overwrite"
        )
    report = run_audit(
        fused, chosen, settings, journal=Path(journal), fusion=str(fusion) if folder else "", resume=resume,
        progress=progress,
    )  # fmt: skip
    judged = claims(report)
    report["claims"] = [claim.to_json() for claim in judged]
    if json_file is not None:
        write(Path(json_file), json.dumps(report, indent=2) + "\n")
    if html_file is not None:
        draw = chosen.draw
        items = [question.inputs[chosen.expert_name] for question in chosen.questions()]
        picture = None if draw is None else lambda figure: draw(figure, items, report["answers"])
        write(Path(html_file), page(report, judged, picture))
    return report


def write(file: Path, text: str) -> None:
    """Complete or not at all."""
    work = file.with_name(f".{file.name}.incomplete")
    try:
        work.write_text(text, encoding="utf-8")
        work.replace(file)
    finally:
        work.unlink(missing_ok=True)


def run_audit(
    fused: FusedModel,
    task: Task,
    settings: AuditSettings,
    *,
    journal: Path,
    fusion: str = "",
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Run (or go on with) an audit; returns the report as plain JSON types. `journal` is the file of finished
    cells, `fusion` says where the fusion came from. Raises InputError, IntegrityError."""
    training = (fused.task or {}).get("training", {})
    trials = Trials(fused, task, training)
    plan = cells(settings, trials.label_count)
    kept = Journal(journal, _fingerprint(fused, task, training), resume=resume)
    try:
        with _progress(progress) as bar:
            line = bar.add_task("", total=len(plan) + 1, completed=sum(cell.key in kept.cells for cell in plan))
            for cell in plan:
                if cell.key in kept.cells:
                    continue
                bar.update(line, description=_title(cell))
                if not cell.control.seeded:
                    trials.close()
                kept.add(cell.key, _run(trials, cell))
                bar.advance(line)
            trials.close()
            if "speech" not in kept.cells:
                bar.update(line, description="language")
                kept.add("speech", speech.measure(trials))
            bar.advance(line)
    finally:
        trials.close()
    summary = summarise({cell.key: kept.cells[cell.key] for cell in plan}, task.metric)
    report = {
        "format": 1,
        "fusion": {
            "folder": fusion,
            "base": fused.source.name,
            "bridge": fused.fusion.config.to_json(),
            "reads": getattr(trials.expert, "tap", "output"),
        },
        "task": {
            "name": task.name,
            "labels": trials.label_count,
            "questions": len(trials.questions),
            "test": len(trials.test),
            "classes": len(getattr(trials.expert, "classes", None) or ()),
            "metric": vars(task.metric),
            "landmarks": dict(task.landmarks),
        },
        "seeds": {
            "count": settings.seeds,
            "enough": settings.seeds >= ENOUGH_SEEDS and not settings.quick,
            "quick": settings.quick,
            "vary": "the bridge's start, the order of training rows, few-label subsets, untrained experts and random "
            "LLMs; the expert, the labels and the test rows are the same for all seeds",
        },
        "training": dict(training) or "the bridge's defaults",
        "machine": machine(),
        "versions": versions(),
        **summary,
        "skill_recovered": skill_recovered(summary["rows"], task.metric),
        "speech": kept.cells["speech"],
        "answers": _answers(trials, kept.cells),
    }
    plain: dict[str, Any] = json.loads(json.dumps(report))
    return plain


def _run(trials: Trials, cell: Cell) -> dict[str, Any]:
    start, busy = time.perf_counter(), time.process_time()
    entry: dict[str, Any] = {"control": cell.control.key, "seed": cell.seed, "labels": cell.labels}
    try:
        outcomes = cell.control.run(trials, cell.seed, cell.labels)
        entry["outcomes"] = [{"variant": o.variant, "scores": o.scores, "texts": list(o.texts)} for o in outcomes]
    except NotApplicable as reason:
        entry["not_applicable"] = str(reason)
    return {**entry, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}


def _answers(trials: Trials, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The saved fusion's answers to all questions, for the task's picture."""
    cell = found.get("saved/0/all")
    return list(cell["outcomes"][0]["texts"]) if cell else []


def _fingerprint(fused: FusedModel, task: Task, training: Mapping[str, Any]) -> str:
    """SHA-256 of what kept cells must share: fusion, task, training, versions. More seeds may be added."""
    digest = hashlib.sha256(
        json.dumps(
            [fused.fusion.config.to_json(), task.name, task.prompt, dict(training), versions()],
            sort_keys=True,
            default=str,
        ).encode()
    )
    for value in fused.fusion.state_dict().values():
        digest.update(value.detach().float().cpu().numpy().tobytes())
    for example in (*task.train, *task.validation, *task.test):
        digest.update(f"{example.prompt}{example.answer}{example.inputs}".encode())
    return digest.hexdigest()


def _title(cell: Cell) -> str:
    few = f", {cell.labels} labels" if cell.labels else ""
    return f"{cell.control.name}{few}, seed {cell.seed}" if cell.control.seeded else cell.control.name


def _progress(show: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not (show and console.is_terminal),
    )
