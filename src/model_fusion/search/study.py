"""An optuna study that can be killed at any moment: proposes values, keeps scores in a journal file. Merges nothing.

Each proposal comes from a fresh sampler, seeded with the study's seed and the trial's number. So a study that was
interrupted and resumed proposes what it would have proposed without the interruption.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from model_fusion.errors import InputError, MissingDependencyError
from model_fusion.recipe.ranges import Choices, Free, Value
from model_fusion.recipe.reading import nearest

SAMPLERS = ("tpe", "cmaes", "grid", "random")
Direction = Literal["minimize", "maximize"]
_NAME = "search"
_START = 30
"""CMA-ES walks from one place and can stay in the valley next to it: it starts from the best of so many TPE trials."""


@dataclass(frozen=True)
class Trial:
    """One proposal and what came of it: a score, or why there is none."""

    number: int
    values: dict[str, Value]
    score: float | None
    failure: str | None = None


def check_sampler(sampler: str) -> None:
    """Raises InputError for a sampler that there is not."""
    if sampler not in SAMPLERS:
        raise InputError(f"sampler {sampler!r}: {nearest(sampler, SAMPLERS)}")


def optuna() -> Any:
    """The library, quiet. Raises MissingDependencyError."""
    try:
        import cmaes  # noqa: F401  (optuna's CMA-ES is made of it)
        import optuna as library
    except ImportError as error:
        raise MissingDependencyError(f"searching needs {error.name}: pip install 'model-fusion[search]'") from None
    library.logging.set_verbosity(library.logging.ERROR)
    return library


class Study:
    """Trials of `space` in the journal `file`, which is made unless it is there."""

    def __init__(
        self, file: Path, space: Mapping[str, Free], sampler: str, seed: int, direction: Direction, trials: int
    ) -> None:
        check_sampler(sampler)
        self._optuna = optuna()
        self.space, self.sampler, self.seed, self.direction = dict(space), sampler, seed, direction
        self.trials = trials
        self._grid = _grid(self.space, trials, seed) if sampler == "grid" else None
        if self._grid is not None:
            self.trials = min(trials, len(self._grid))
        backend = self._optuna.storages.journal.JournalFileBackend(str(file))
        self._study = self._optuna.create_study(
            storage=self._optuna.storages.JournalStorage(backend),
            study_name=_NAME,
            direction=direction,
            load_if_exists=True,
        )

    def proposals(self) -> Iterator[tuple[int, dict[str, Value]]]:
        """(number, values) of each trial still to be made, those that an interruption cut off first. Each must be
        answered by `tell` before the next is asked for."""
        states = self._optuna.trial.TrialState
        for cut in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            if set(cut.params) == set(self.space):
                yield cut.number, dict(cut.params)
            else:  # killed between two values
                self.tell(cut.number, None, "interrupted")
        while (number := len(self._study.get_trials(deepcopy=False))) < self.trials:
            yield self._ask(number)

    def _ask(self, number: int) -> tuple[int, dict[str, Value]]:
        if self._grid is not None:
            self._enqueue(self._grid[number])
        elif number == 0:
            self._enqueue({name: middle(free) for name, free in self.space.items()})
        self._study.sampler = self._sampler(number)
        trial = self._study.ask({name: self._distribution(free) for name, free in self.space.items()})
        return int(trial.number), dict(trial.params)

    def _enqueue(self, values: Mapping[str, Value]) -> None:
        waiting = self._optuna.trial.TrialState.WAITING
        if not self._study.get_trials(deepcopy=False, states=(waiting,)):
            self._study.enqueue_trial(dict(values))

    def tell(self, number: int, score: float | None, failure: str | None = None) -> None:
        """Keep a trial's score, or why it has none; on disk before this returns."""
        if score is None:
            trial = self._study.get_trials(deepcopy=False)[number]
            storage = self._study._storage
            storage.set_trial_user_attr(trial._trial_id, "failure", failure or "no score")
            self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(number, score)

    def results(self) -> list[Trial]:
        """Every finished trial, in order."""
        states = self._optuna.trial.TrialState
        done = self._study.get_trials(deepcopy=False, states=(states.COMPLETE, states.FAIL))
        return [Trial(t.number, dict(t.params), t.value, t.user_attrs.get("failure")) for t in done]

    def best(self) -> Trial | None:
        """The finished trial with the best score, the first of equals."""
        scored = [trial for trial in self.results() if trial.score is not None]
        return min(scored, key=lambda t: self.sign * (t.score or 0.0), default=None)

    @property
    def sign(self) -> int:
        """Times a score: lower is better."""
        return 1 if self.direction == "minimize" else -1

    def _sampler(self, number: int) -> Any:
        samplers, seed = self._optuna.samplers, (self.seed * 1_000_003 + number) % 2**32
        numbers = sum(not isinstance(free, Choices) for free in self.space.values())
        if self.sampler == "cmaes" and numbers > 1 and number >= _START:  # one dimension has no covariance to adapt
            known = self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.COMPLETE,))
            start = [trial for trial in known if trial.number < _START]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
                return samplers.CmaEsSampler(
                    seed=seed,
                    source_trials=start or None,
                    independent_sampler=samplers.TPESampler(seed=seed),
                    warn_independent_sampling=False,
                )
        return samplers.TPESampler(seed=seed) if self.sampler in ("tpe", "cmaes") else samplers.RandomSampler(seed=seed)

    def _distribution(self, free: Free) -> Any:
        kinds = self._optuna.distributions
        if isinstance(free, Choices):
            return kinds.CategoricalDistribution(free.options)
        if free.whole:
            return kinds.IntDistribution(int(free.low), int(free.high), step=int(free.step or 1))
        return kinds.FloatDistribution(float(free.low), float(free.high), log=free.log, step=free.step)


def middle(free: Free) -> Value:
    """Where a search begins."""
    points = free.points(3)
    return points[0] if isinstance(free, Choices) else points[len(points) // 2]


def _grid(space: Mapping[str, Free], trials: int, seed: int) -> list[dict[str, Value]]:
    """All points of the finest even grid that `trials` can visit, in random order; ranges without a step get as many
    points each as fit. Where the steps make more points than trials, that many are visited."""
    axes = {name: free.points(2) for name, free in space.items()}
    open_ends = [name for name, free in space.items() if not isinstance(free, Choices) and free.step is None]
    count = 2
    while open_ends:
        finer = axes | {name: space[name].points(count) for name in open_ends}
        size = 1
        for points in finer.values():
            size *= len(points)
        if size > max(trials, 1):
            break
        axes, count = finer, count + 1
    found = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    random.Random(seed).shuffle(found)
    return found
