"""README's table and the pictures, from result files.

python -m bench.report                  # all of bench/results: rows (*.csv) and the host's times (host.json)
python -m bench.report FILE.csv ... --readme OTHER.md   # these alone, in another file
python -m bench.report --check          # only say whether README is what the files say
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import rows
from .bars import judged
from .environment import ROOT
from .table import Results, markdown

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SOURCE = (
    '`pip install -e ".[test,bench]" && pytest bench/` times the head and its peers, each checked against '
    "the reference first;\n`python -m bench.report` prints these tables from "
    "[bench/results](bench/results/README.md)."
)
HOST = "host.json"


def block(files: Sequence[Path]) -> str:
    """What stands in README, markers included."""
    return f"{BEGIN}\n{markdown(files)}\n\n{SOURCE}\n{END}"


def replaced(text: str, new: str) -> str:
    """`text` with its block replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README must have one {BEGIN} and after it one {END}")
    return text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :]


def result_files(folder: Path = rows.RESULTS) -> list[Path]:
    """All rows, then what `python -m bench.host --compile --json` wrote, if it is there."""
    return [*sorted(folder.glob("*.csv")), *folder.glob(HOST)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="result files (default: all in bench/results)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--plots", type=Path, default=rows.RESULTS / "plots")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if README is stale")
    chosen = parser.parse_args(arguments)
    if chosen.files and chosen.readme.resolve() == ROOT / "README.md":
        parser.error("README has the tables of all result files: name another --readme for some of them")
    files = chosen.files or result_files()
    if not files:
        print(f"no result files in {rows.RESULTS.name}: run pytest bench/ first", file=sys.stderr)
        return 2
    old = chosen.readme.read_text()
    new = replaced(old, block(files))
    if chosen.check:
        print("README is stale: python -m bench.report" if new != old else "README is up to date")
        return int(new != old)
    chosen.readme.write_text(new)
    from . import plots

    for path in files:
        if path.suffix != ".csv":
            continue
        results = Results(path)
        print(path.name, *(picture.name for picture in plots.draw(results, chosen.plots)), sep="\n  ")
        for line in judged(results):
            print(f"  {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
