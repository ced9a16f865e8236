"""What ends a run early: input that a user can put right, or Ctrl-C."""

from __future__ import annotations


class TrainError(ValueError):
    """Bad input to a training command: the message names it and says what was expected."""


class Interrupted(Exception):
    """Ctrl-C arrived at a point where the work can stop cleanly."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or the name of its class."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
