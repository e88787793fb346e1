"""What SIGINT (Ctrl-C) and SIGTERM (a scheduler's) do: an interruption, or first a wish that a loop grants when it can."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """True once somebody asked the process to stop."""

    asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextmanager
def stopping() -> Iterator[Stop]:
    """Turn the first SIGINT or SIGTERM into a flag; the second one interrupts at once."""
    stop = Stop()

    def ask(_signal, _frame):
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    with handled(ask):
        yield stop


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt as SIGINT does: who is interrupted keeps what is whole, and says what goes on."""

    def interrupt(_signal, _frame):
        raise KeyboardInterrupt

    with handled(interrupt):
        yield


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Both signals call a function meanwhile. Outside the main thread, which alone hears signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
