"""The first Ctrl-C waits for a safe point. The second one stops at once."""

import signal
import threading

import pytest

from ggam_fast.training.errors import Interrupted
from ggam_fast.training.system.interrupts import InterruptGuard


def test_first_and_second_interrupt():
    before = signal.getsignal(signal.SIGINT)
    with InterruptGuard() as guard:
        guard.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            guard.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_leaves_the_handler_alone():
    found = []

    def enter():
        with InterruptGuard() as guard:
            guard.check()
            found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]
