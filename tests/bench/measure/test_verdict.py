"""The line says whether a target is met."""

import pytest

from bench.measure.verdict import verdict


@pytest.mark.parametrize(
    ("value", "at_least", "line"),
    [
        (0.5, False, "met    x: 0.50 (at most 0.5)"),
        (0.51, False, "MISSED x: 0.51 (at most 0.5)"),
        (0.5, True, "met    x: 0.50 (at least 0.5)"),
        (0.49, True, "MISSED x: 0.49 (at least 0.5)"),
    ],
)
def test_verdict(value: float, at_least: bool, line: str) -> None:
    assert verdict("x", value, 0.5, at_least=at_least) == line


def test_digits() -> None:
    assert verdict("launches", 28, 28, digits=0) == "met    launches: 28 (at most 28)"
