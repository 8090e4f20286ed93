"""Ctrl-C in training takes effect after the step in progress, so that a state that can be resumed is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupt_after_step(wanted: bool = True) -> Iterator[Callable[[], bool]]:
    """While inside, a first Ctrl-C makes the yielded function return True; a second interrupts at once.

    Python delivers signals to the main thread only: elsewhere, or when not `wanted`, nothing is changed.
    """
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = False

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
