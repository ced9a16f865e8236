"""Exceptions that end a run early: bad input, or Ctrl-C."""

from __future__ import annotations


class TrainError(ValueError):
    """Bad input to a training command. The message names it and says what is expected."""


class Interrupted(Exception):
    """Ctrl-C arrived at a point where the work can stop cleanly."""


def first_line(error: BaseException) -> str:
    """The first line with text in the message of `error`, or else the name of its class."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
