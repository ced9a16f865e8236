"""Ctrl-C as a request to stop at the next safe point."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from ggam_fast.training.errors import Interrupted


class InterruptGuard:
    """Inside the `with` block, the first Ctrl-C makes `check` raise. The second one stops at once."""

    def __init__(self) -> None:
        self._requested = False
        self._previous: Any = None

    def __enter__(self) -> InterruptGuard:
        # Python lets only the main thread handle signals. In other threads Ctrl-C works as before.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raise `Interrupted` if Ctrl-C was pressed."""
        if self._requested:
            raise Interrupted

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
