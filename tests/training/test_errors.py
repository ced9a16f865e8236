"""Errors become one line."""

import pytest

from ggam_fast.training.errors import Interrupted, TrainError, first_line, out_of_memory


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("\n\nno compiler\nand a long trace"), "no compiler"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (KeyError(), "KeyError"),
        (RuntimeError("  \n"), "RuntimeError"),
    ],
)
def test_first_line(error, line):
    assert first_line(error) == line


def test_bad_input_is_a_value_error_and_an_interruption_is_not():
    assert issubclass(TrainError, ValueError)
    assert not issubclass(Interrupted, ValueError)


def test_too_little_memory_is_told_from_other_errors():
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
