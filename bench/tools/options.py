"""The command-line options that tools share."""

import argparse

from bench.suite.cases import Case

_FORM = "NxCxHxW or NxCxHxW-TYPE-LAYOUT, such as 32x2048x14x14-bfloat16-nchw"


def case(text: str) -> Case:
    """A case from its text.  For a wrong text, argparse prints the whole message of the error."""
    try:
        return Case.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_case(parser: argparse.ArgumentParser, default: Case) -> None:
    """`--case CASE`"""
    text = f"{_FORM} (default: {default})"
    parser.add_argument("--case", type=case, default=default, metavar="CASE", help=text)


def add_cases(parser: argparse.ArgumentParser, default: list[Case]) -> None:
    """`--case CASE CASE ...`"""
    text = f"{_FORM} (default: {', '.join(map(str, default))})"
    parser.add_argument("--case", nargs="+", type=case, default=default, metavar="CASE", help=text)
