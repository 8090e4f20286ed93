"""A search from recipe to merged folder: check, try, compare with plain task arithmetic, test once, write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from model_fusion.checkpoint.output_folder import check_target
from model_fusion.checkpoint.reader import read_json
from model_fusion.errors import InputError
from model_fusion.evaluate.journal import Journal
from model_fusion.merge.device import check_device
from model_fusion.recipe.merge import MergeRecipe
from model_fusion.search import outcome, progress
from model_fusion.search.candidates import Candidates, Flags
from model_fusion.search.held_out import TestSet, check_apart
from model_fusion.search.metrics import Metric, Own, OwnMetric, TextMetric, check_name
from model_fusion.search.outcome import Candidate
from model_fusion.search.study import Direction, Study, check_sampler, optuna
from model_fusion.search.workroom import Workroom

REPORT, RECIPE = "search.json", "recipe.yml"


@dataclass(frozen=True)
class Found:
    """A finished search: the merged `folder`, the winner's `recipe`, and the `report`; both lie in the folder, as
    recipe.yml and search.json."""

    folder: Path
    recipe: dict[str, Any]
    report: dict[str, Any]


def search(
    recipe: Path | Mapping[str, Any],
    output: Path,
    *,
    metric: str | Own,
    validation: Any,
    test: Any,
    trials: int = 100,
    sampler: str = "tpe",
    seed: int = 0,
    direction: Direction | None = None,
    base: str | None = None,
    window: int = 512,
    resume: bool = False,
    overwrite: bool = False,
    threads: int = 0,
    trust_remote_code: bool = False,
    fill_missing: str | None = None,
    device: str = "cpu",
) -> Found:
    """Find values for the ranges of a merge recipe, and merge with the best.

    **Arguments**
    metric: bits_per_byte, loss or perplexity of text files; or a function of (merged state dict, data) → number.
    validation, test: text files (a path or several); for a function anything, or a function without arguments that
        gives it. The test set is opened after the last trial, and judges two models: the winner, and the best of plain
        task arithmetic.
    direction: of a function; "maximize" unless given. base: for task arithmetic, where the recipe names none.
    device: where a named metric runs the merged model.
    resume: go on with an interrupted search of the same recipe, inputs and data; `trials` may have grown.

    **Raises** InputError for what does not fit, before anything is written.
    """
    check_sampler(sampler)
    check_name(metric, direction)
    check_device(device)
    optuna()
    if trials < 1 or window < 2:
        raise InputError(f"trials {trials} and window {window}: give at least 1 trial and 2 tokens")
    digests = check_apart(validation, test)
    candidates = Candidates(recipe, base, Flags(threads, trust_remote_code, fill_missing))
    judge = _judge(metric, direction, window, candidates, device)
    for content in (validation, test):
        judge.check(content)
    settings = {
        "recipe": candidates.data,
        "models": candidates.fingerprint(),
        "metric": judge.name,
        "direction": judge.direction,
        "window": window,
        "sampler": sampler,
        "seed": seed,
        "base": base,
        "validation": digests[0],
        "test": digests[1],
        **({"trials": trials} if sampler == "grid" else {}),
    }
    earlier = _earlier_reads(output, settings, overwrite)
    check_target(output, candidates.places(), overwrite=overwrite)
    data = judge.load(validation)
    with Workroom(output, settings, resume=resume) as room:
        study = Study(room.folder / "study.journal", candidates.space, sampler, seed, judge.direction, trials)
        shut = TestSet(test, room.folder / "test.json", earlier)
        if shut.opened and len(study.results()) < study.trials:
            raise InputError("the test set of this search was read already: it cannot be given more trials")
        plain = Journal(room.folder / "plain.jsonl", "plain", resume=True)
        _try(candidates, study, plain, judge, data)
        best, best_plain = _best(candidates, study, plain)
        scores = shut.read(partial(_on_test, candidates, judge, best, best_plain))
        tried = list(plain.cells.values()), candidates.why_not
        report = outcome.report(
            settings, candidates.space, study.results(), *tried, best, best_plain, scores, shut.reads
        )
        found = _write(candidates, best, report, output, overwrite)
        room.finish()
    return Found(output, found, report)


def _on_test(
    candidates: Candidates, judge: Metric, best: Candidate, plain: Candidate | None, content: Any
) -> dict[str, float]:
    """What the test set says of the winner and of plain task arithmetic."""
    data = judge.load(content)
    asked = {"winner": best} | ({"task_arithmetic": plain} if plain else {})
    return {name: judge.score(candidates.merged(one.recipe), data) for name, one in asked.items()}


def _write(
    candidates: Candidates, best: Candidate, report: Mapping[str, Any], output: Path, overwrite: bool
) -> dict[str, Any]:
    """Merge by the best recipe, with recipe and report beside it; returns the recipe."""
    found = candidates.portable(best.recipe, output)
    files = {
        REPORT: json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n",
        RECIPE: yaml.safe_dump(found, sort_keys=False, allow_unicode=True).encode(),
    }
    notes = [f"Coefficients found by a search; every trial is in `{REPORT}`.", report["sentence"]]
    candidates.write(best.recipe, output, notes, files, overwrite)
    return found


def _judge(metric: str | Own, direction: Direction | None, window: int, candidates: Candidates, device: str) -> Metric:
    if isinstance(metric, str):
        return TextMetric(metric, window, candidates.shape.config, candidates.shape.files, device)
    return OwnMetric(metric, direction)


def _earlier_reads(output: Path, settings: Mapping[str, Any], overwrite: bool) -> int:
    """How often this test set was read for the search whose result lies at `output`. Raises InputError where that is
    this very search, finished, and nobody asked to replace it."""
    if not (output / REPORT).is_file():
        return 0
    report = read_json(output / REPORT)
    was = report.get("settings", {})
    if not overwrite and was == json.loads(json.dumps(settings)):
        raise InputError(
            f"this search is finished and its test set was read: see {output / REPORT}; --overwrite searches anew and "
            "marks the test result as a re-read"
        )
    shared = set(was.get("test", ())) & set(settings["test"])
    return int(report["test"]["reads"]) if shared else 0


def _try(candidates: Candidates, study: Study, plain: Journal, judge: Metric, data: Any) -> None:
    """Plain task arithmetic first, then every trial that is still to be made. A merge that fails has no score."""

    def attempt(make: Callable[[], MergeRecipe]) -> tuple[float | None, str | None]:
        try:
            score = judge.score(candidates.merged(make()), data)
        except InputError as error:
            return None, str(error)
        return (score, None) if math.isfinite(score) else (None, f"the score is {score}")

    done = len(plain.cells) + len(study.results())
    with progress.bar(len(candidates.plain) + study.trials, done, judge.name) as step:

        def note() -> None:
            known = [cell["score"] for cell in plain.cells.values()] + [trial.score for trial in study.results()]
            step(min((v for v in known if v is not None), key=lambda value: study.sign * value, default=None))

        for scale, recipe in candidates.plain.items():
            if str(scale) not in plain.cells:
                score, failure = attempt(partial(_same, recipe))
                plain.add(str(scale), {"lambda": scale, "score": score, "failure": failure})
                note()
        for number, values in study.proposals():
            study.tell(number, *attempt(partial(candidates.recipe, values)))
            note()


def _same(recipe: MergeRecipe) -> MergeRecipe:
    return recipe


def _best(candidates: Candidates, study: Study, plain: Journal) -> tuple[Candidate, Candidate | None]:
    """The winner on validation, and the best of plain task arithmetic if it has any score."""
    trial = study.best()
    searched = None
    if trial is not None and trial.score is not None:
        searched = Candidate("search", trial.values, candidates.recipe(trial.values), trial.score)
    scored = [cell for cell in plain.cells.values() if cell["score"] is not None]
    cell = min(scored, key=lambda cell: study.sign * cell["score"], default=None)
    simple = None
    if cell is not None:
        scale = cell["lambda"]
        simple = Candidate("task_arithmetic", {"lambda": scale}, candidates.plain[scale], cell["score"])
    failures = [found["failure"] for found in plain.cells.values()] + [found.failure for found in study.results()]
    return outcome.winner(searched, simple, study.sign, next((f for f in failures if f), None)), simple
