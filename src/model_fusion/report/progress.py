"""A progress bar on standard error; silent where that is no terminal. Knows nothing of what is counted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def bar(label: str) -> Iterator[Callable[[int], None]]:
    """Yields a function to call after each step, from any thread, with the number of steps there are."""
    console = Console(stderr=True)
    columns = [TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left")]
    columns.append(TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as shown:
        task = shown.add_task(label, total=None)
        yield lambda total: shown.update(task, advance=1, total=total)
