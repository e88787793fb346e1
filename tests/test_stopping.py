"""The first signal is a wish, the second one an order."""

import os
import signal
import threading

import pytest

from stepdistill.stopping import interruptible, stopping

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("first", BOTH)
@pytest.mark.parametrize("second", BOTH)
def test_the_first_is_a_wish_and_the_second_an_order(first, second):
    before = [signal.getsignal(number) for number in BOTH]
    with stopping() as stop:
        assert not stop
        os.kill(os.getpid(), first)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
    assert [signal.getsignal(number) for number in BOTH] == before


@pytest.mark.parametrize("number", BOTH)
def test_elsewhere_both_interrupt(number):
    before = [signal.getsignal(number) for number in BOTH]
    with pytest.raises(KeyboardInterrupt), interruptible():
        with stopping() as stop:
            pass
        os.kill(os.getpid(), number)
    assert [signal.getsignal(number) for number in BOTH] == before and not stop


def test_a_thread_hears_no_signals_and_changes_nothing():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with interruptible(), stopping() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
