"""Where the time of a run goes: seconds by name, and each moment belongs to one name, so that they add up to all of it.

On a CPU a moment is one of the monotonic clock, which never jumps. On a GPU Python only orders work, and goes on: there it is
an event in the order of the work, read once the GPU has passed it; nothing waits for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

OTHER = "other"
ORDERED = ("cuda", "xpu")  # devices whose work is ordered ahead, and that keep the time of events


class Moment(Protocol):
    def passed(self) -> bool:
        """Whether the device has come to it."""

    def since(self, earlier: Moment) -> float:
        """Seconds from an earlier one, both passed."""


class Clock:
    """A moment of Python."""

    def __init__(self) -> None:
        self.at = time.monotonic()

    def passed(self) -> bool:
        return True

    def since(self, earlier: Clock) -> float:
        return self.at - earlier.at


class Event:
    """A moment in the work of the current device."""

    def __init__(self) -> None:
        self.event = torch.Event(enable_timing=True)
        self.event.record()

    def passed(self) -> bool:
        return self.event.query()

    def since(self, earlier: Event) -> float:
        return earlier.event.elapsed_time(self.event) / 1e3


class Times:
    """Seconds by name since they were last taken: `with times("data"): ...`; what no name claims is OTHER's.

    device: whose time it is. now: makes a moment; None: what the device wants.
    """

    def __init__(self, device: torch.device, now: Callable[[], Moment] | None = None):
        self.now = now or (Event if device.type in ORDERED else Clock)
        self.within = OTHER
        self.last = self.now()
        self.laps: deque[tuple[str, Moment, Moment]] = deque()  # name, from, to, of what the device may not have done yet
        self.found: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What happens in here is the name's, but for what an inner name claims."""
        self.lap(self.within)
        outer, self.within = self.within, name
        try:
            yield
        finally:
            self.lap(name)
            self.within = outer

    def lap(self, name: str) -> None:
        """All since the last moment was the name's: for whose name is known only afterwards."""
        now = self.now()
        self.laps.append((name, self.last, now))
        self.last = now
        while self.laps and self.laps[0][2].passed():
            name, start, end = self.laps.popleft()
            self.found[name] = self.found.get(name, 0.0) + end.since(start)

    def take(self) -> dict[str, float]:
        """Seconds by name since the last take; what the device has not done yet is told the next time."""
        self.lap(self.within)
        found, self.found = self.found, {}
        return found
