"""The generated block of docs/performance.md."""

from collections.abc import Sequence
from pathlib import Path

from bench.measure import records
from bench.measure.environment import ROOT
from bench.report.tables import markdown

PAGE = ROOT / "docs" / "performance.md"
PLOTS = records.RESULTS / "plots"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SOURCE = (
    '`pip install -e ".[test,bench]" && pytest bench/` times the head and its peers. Each is first checked\n'
    "against the reference. `python -m bench.report` writes these tables from\n"
    "[bench/results](../bench/results/README.md)."
)
HOST = "host.json"


def block(files: Sequence[Path]) -> str:
    """The block with its markers."""
    return f"{BEGIN}\n{markdown(files)}\n\n{SOURCE}\n{END}"


def replaced(text: str, new: str) -> str:
    """The text of a page with its block replaced by `new`."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the page must have one {BEGIN} and then one {END}")
    return text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :]


def result_files(folder: Path = records.RESULTS) -> list[Path]:
    """The files of records, then the file of `python -m bench.host --compile --json` if there is one."""
    return [*sorted(folder.glob("*.csv")), *folder.glob(HOST)]
