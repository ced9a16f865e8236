"""A case on the command line."""

import argparse

import pytest

from bench.suite.cases import Case
from bench.tools import options


def test_cases() -> None:
    parser = argparse.ArgumentParser()
    options.add_cases(parser, [Case(1, 2, 3, 4)])
    assert parser.parse_args([]).case == [Case(1, 2, 3, 4)]
    given = ["5x6x7x8", "1x2x3x4-float32-nlc"]
    assert [str(case) for case in parser.parse_args(["--case", *given]).case] == [
        "5x6x7x8-bfloat16-nchw",
        "1x2x3x4-float32-nlc",
    ]


def test_what_is_no_case(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    options.add_case(parser, Case(1, 2, 3, 4))
    with pytest.raises(SystemExit):
        parser.parse_args(["--case", "1x2"])
    assert "a case must be NxCxHxW" in capsys.readouterr().err
