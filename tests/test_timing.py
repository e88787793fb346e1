"""Each moment belongs to one name: on a clock, and on a device that does its work later."""

import pytest
import torch

from stepdistill import timing
from stepdistill.timing import Clock, Times


class Still:
    """A clock that a test winds: moments of a device that passes them when it is told to."""

    def __init__(self, done=float("inf")):
        self.time, self.done = 0.0, done

    def __call__(self):
        clock, at = self, self.time

        class Moment:
            def passed(self):
                return at <= clock.done

            def since(self, earlier):
                assert self.passed() and earlier.passed(), "read before the device came to it"
                return at - earlier.at

        made = Moment()
        made.at = at
        return made


def timed(done=float("inf")):
    clock = Still(done)
    return clock, Times(torch.device("cpu"), clock)


def test_names_share_out_the_time_and_inner_ones_take_it_from_outer_ones():
    clock, times = timed()
    clock.time = 1
    with times("saving"):
        clock.time = 3
        with times("evaluation"):
            clock.time = 7
        clock.time = 15
    clock.time = 31
    assert times.take() == {"other": 1 + 16, "saving": 2 + 8, "evaluation": 4}
    assert times.take() == {"other": 0}


def test_a_lap_names_what_is_over():
    clock, times = timed()
    with times("data"):
        clock.time = 1
    for who, seconds in (("student", 2), ("critic", 4), ("student", 8)):
        clock.time += seconds
        times.lap(who)
    clock.time += 16
    assert times.take() == {"other": 16, "data": 1, "student": 10, "critic": 4}


def test_what_fails_inside_a_name_is_the_names_and_what_follows_is_not():
    clock, times = timed()
    with pytest.raises(ValueError), times("saving"):
        clock.time = 2
        raise ValueError
    clock.time = 3
    assert times.take() == {"other": 1, "saving": 2}


def test_a_device_is_not_waited_for_and_what_it_does_later_is_told_later():
    clock, times = timed(done=0)
    for k in range(1, 4):
        clock.time = k
        times.lap("student")
    assert times.take() == {}
    clock.done = 2
    assert times.take() == {"student": 2}
    clock.done = clock.time = 5
    assert times.take() == {"student": 1, "other": 2}


def test_nothing_piles_up_where_nobody_asks():
    _, times = timed()
    for _ in range(100):
        times.lap("student")
    assert not times.laps


def test_a_cpu_is_timed_by_a_clock_and_a_gpu_by_events(monkeypatch):
    assert isinstance(Times(torch.device("cpu")).last, Clock)
    made = []

    class Fake:
        def __init__(self, enable_timing):
            assert enable_timing
            made.append(self)

        def record(self):
            self.at = 2000.0 * len(made)  # milliseconds

        def query(self):
            return True

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(timing.torch, "Event", Fake)
    times = Times(torch.device("cuda"))
    times.lap("student")
    assert times.found == {"student": 2.0} and len(made) == 2
