"""Ctrl-C and SIGTERM as requests to stop at the next safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ggam_fast.training.errors import Interrupted


class InterruptGuard:
    """Inside the `with` block, the first Ctrl-C makes `check` raise. The second one stops at once.

    SIGTERM makes `check` raise too. It may come several times, because a batch system and torchrun both
    send it.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptGuard:
        # Python lets only the main thread handle signals. In other threads Ctrl-C works as before.
        if threading.current_thread() is threading.main_thread():
            self._previous = {
                number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *raised: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def check(self) -> None:
        """Raise `Interrupted` if Ctrl-C was pressed or SIGTERM came."""
        if self._requested:
            raise Interrupted

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True


@contextmanager
def terminating() -> Iterator[None]:
    """Inside the `with` block, SIGTERM raises `KeyboardInterrupt`, so that partial files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
