"""The progress bar of a search: trials, the best score so far, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def bar(total: int, done: int, metric: str) -> Iterator[Callable[[float | None], None]]:
    """Yields a function to call after each trial with the best score so far. Silent where standard error is no
    terminal."""
    console = Console(stderr=True)
    columns = [
        TextColumn("search"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"best {metric} {{task.fields[best]}}"),
    ]
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as shown:
        task = shown.add_task("search", total=total, completed=done, best="–")
        yield lambda best: shown.update(task, advance=1, best="–" if best is None else f"{best:.5g}")
