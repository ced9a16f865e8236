"""The first Ctrl-C and SIGTERM wait for a safe point. The second Ctrl-C stops at once."""

import signal
import threading

import pytest

from ggam_fast.training.errors import Interrupted
from ggam_fast.training.system.files import write_atomically
from ggam_fast.training.system.interrupts import InterruptGuard, terminating


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


def test_sigterm_waits_however_often_it_comes():
    before = signal.getsignal(signal.SIGTERM)
    with InterruptGuard() as guard:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            guard.check()
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_elsewhere_unwinds(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminating():
        write_atomically(tmp_path / "result", lambda part: signal.raise_signal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is before
    assert list(tmp_path.iterdir()) == []


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
