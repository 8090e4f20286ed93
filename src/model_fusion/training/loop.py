"""The one training loop: fuse, mix and dynamic share it. It knows no bridge, expert or router.

`accelerate` is underneath, so `accelerate launch` scales a run with no device code here.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from model_fusion.errors import InputError, IntegrityError
from model_fusion.training.interrupt import interrupt_after_step
from model_fusion.training.progress import Progress


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast.

    `steps` 0: as many as `epochs` passes over the examples take, at least 40. `patience`: validations without
    improvement before stopping early; 0 never stops. `target`: stop when the validation score (a share, higher is
    better) and loss reach (score, loss) at `hold` validations in a row: one alone can be luck where few rows
    validate.
    """

    steps: int = 0
    epochs: float = 2.0
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup: int = 5
    clip: float = 1.0
    validate_every: int = 10
    patience: int = 10
    target: tuple[float, float] | None = None
    hold: int = 2
    seed: int = 0
    save_every_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "validate_every", "hold"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < 0 or not self.epochs > 0:
            raise InputError(f"steps must not be negative and epochs above 0, got {self.steps} and {self.epochs}")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate must be above 0, got {self.learning_rate}")

    def steps_for(self, examples: int) -> int:
        """How many steps a run over `examples` examples takes at most."""
        return self.steps or max(40, math.ceil(self.epochs * examples / self.batch_size))


@dataclass
class Measure:
    """One validation: mean `loss` and `score` in [0, 1] (fuse: share of answers that greedy decoding gets right)."""

    loss: float
    score: float


@dataclass
class History:
    """What happened. Times in seconds; `best_step` is the step whose parameters were kept."""

    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float, float]] = field(default_factory=list)
    best_step: int = 0
    seconds: float = 0.0
    stopped: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def train(
    step: nn.Module,
    parameters: Sequence[nn.Parameter],
    examples: int,
    validate: Callable[[], Measure],
    settings: TrainSettings,
    *,
    resume: Path | None = None,
    keep: bool = False,
    fingerprint: str = "",
    progress: bool = True,
) -> History:
    """Minimise `step(indices)` over `parameters`; keep those of the best validation (score, then loss).

    step: module from int64 indices [b] of examples to a scalar loss. resume: a file where the state is kept
    while running and from which an interrupted run goes on; it is removed when training completes, unless `keep`
    leaves the complete state there for a caller that has yet to save the result. Ctrl-C saves it first.
    fingerprint: what must be equal for a resumed state to fit (settings and data). Raises InputError on a loss
    that is not finite, IntegrityError when `resume` belongs to another run.
    """
    from accelerate import Accelerator

    settings = replace(settings, steps=settings.steps_for(examples))
    accelerator = Accelerator(cpu=all(p.device.type == "cpu" for p in parameters))
    generator = torch.Generator().manual_seed(settings.seed)
    indices = cast(Dataset[int], range(examples))
    order: Any = DataLoader(indices, batch_size=min(settings.batch_size, examples), shuffle=True, generator=generator)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    step, optimizer, order = accelerator.prepare(step, optimizer, order)
    state = _State(parameters, optimizer, resume if accelerator.is_main_process else None, fingerprint)
    history, best, since = state.load(resume)
    done, clock, saved = len(history.losses), time.monotonic() - history.seconds, time.monotonic()
    with (
        interrupt_after_step(resume is not None) as interrupted,
        Progress(settings.steps, done, show=progress and accelerator.is_local_main_process) as bar,
    ):
        batches = _endless(order, skip=done)
        while done < settings.steps and not history.stopped:
            _schedule(optimizer, done, settings)
            loss = step(next(batches))
            if not math.isfinite(value := float(loss.detach())):
                raise InputError(
                    f"the training loss became {value} at step {done + 1}: lower learning_rate, or check the inputs"
                )
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            history.losses.append(value)
            if done % settings.validate_every == 0 or done == settings.steps:
                measure = validate()
                history.validations.append((done, measure.loss, measure.score))
                if best is None or (measure.score, -measure.loss) > (best[0].score, -best[0].loss):
                    best, since, history.best_step = (measure, state.copy()), 0, done
                else:
                    since += 1
                history.stopped = _stop(history, since, settings)
            bar.update(done, value, history.validations[-1][2] if history.validations else None)
            history.seconds = time.monotonic() - clock
            if resume and time.monotonic() - saved > settings.save_every_seconds:
                state.save(history, best, since)
                saved = time.monotonic()
            if interrupted():
                state.save(history, best, since)
                raise KeyboardInterrupt
    if keep:
        state.save(history, best, since)
    else:
        state.forget()
    if best is not None:
        state.restore(best[1])
    return history


def _stop(history: History, since: int, settings: TrainSettings) -> str:
    if settings.target:
        last = history.validations[-settings.hold :]
        reached = [score >= settings.target[0] and loss <= settings.target[1] for _, loss, score in last]
        if len(reached) == settings.hold and all(reached):
            return "target reached"
    return "no improvement" if settings.patience and since >= settings.patience else ""


def _schedule(optimizer: Any, done: int, settings: TrainSettings) -> None:
    """Linear warm-up, then a cosine down to a tenth."""
    rising = min(1.0, (done + 1) / max(1, settings.warmup))
    falling = 0.55 + 0.45 * math.cos(math.pi * done / settings.steps)
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * rising * falling


def _endless(order: Any, skip: int) -> Any:
    """Batches for ever, in an order that the seed fixes; the first `skip` are passed over (resume)."""
    number = 0
    while True:
        for batch in order:
            number += 1
            if number > skip:
                yield batch


class _State:
    """Parameters and optimizer of a run: copied for the best validation, saved for resuming."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Any, file: Path | None, fingerprint: str) -> None:
        self.parameters, self.optimizer, self.file, self.fingerprint = (
            list(parameters),
            optimizer,
            file,
            fingerprint,
        )

    def copy(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def restore(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def save(self, history: History, best: tuple[Measure, list[Tensor]] | None, since: int) -> None:
        if self.file is None:
            return
        data = {
            "fingerprint": self.fingerprint,
            "history": history.to_json(),
            "since": since,
            "best": None if best is None else [best[0].loss, best[0].score, best[1]],
            "parameters": self.copy(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.file.parent, prefix=".resume-")
        os.close(handle)
        try:
            buffer = io.BytesIO()  # torch's own writer would tell of a full disk as a RuntimeError
            torch.save(data, buffer)
            Path(name).write_bytes(buffer.getbuffer())
            os.replace(name, self.file)
        finally:
            Path(name).unlink(missing_ok=True)

    def load(self, file: Path | None) -> tuple[History, tuple[Measure, list[Tensor]] | None, int]:
        if file is None or not file.is_file():
            return History(), None, 0
        data = torch.load(file, weights_only=True)
        if data["fingerprint"] != self.fingerprint:
            raise IntegrityError(f"{file}: belongs to a run with other data or settings: delete it to start afresh")
        self.restore(data["parameters"])
        self.optimizer.load_state_dict(data["optimizer"])
        history = History(**{**data["history"], "validations": [tuple(v) for v in data["history"]["validations"]]})
        best = data["best"] and (Measure(data["best"][0], data["best"][1]), data["best"][2])
        return history, best, data["since"]

    def forget(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)
