"""Errors become one line."""

import pytest

from ggam_fast.training.errors import Interrupted, TrainError, first_line


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
