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


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the memory of the machine or of the GPU does not suffice."""
    text = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text


def worker_died(error: BaseException) -> bool:
    """Whether `error` is torch's report that a process that decodes images was killed."""
    text = str(error)
    return "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text)
