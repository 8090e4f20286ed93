"""The progress bar of a training run: loss, agreement on validation data, time left."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A rich bar on standard error; silent where that is no terminal or `show` is false."""

    def __init__(self, total: int, done: int = 0, *, show: bool = True) -> None:
        console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  agreement {task.fields[score]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (show and console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=total, completed=done, loss="–", score="–")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, loss: float, score: float | None) -> None:
        fields: dict[str, Any] = {"loss": f"{loss:.4f}"}
        if score is not None:
            fields["score"] = f"{score:.3f}"
        self._bar.update(self._task, completed=done, **fields)
