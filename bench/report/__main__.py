"""Writes the tables and pictures of docs/performance.md from result files, and prints the targets.

python -m bench.report           # from bench/results: records (*.csv) and host times (host.json)
python -m bench.report FILE.csv ... --page OTHER.md --plots FOLDER    # these files into another page
python -m bench.report --check   # change nothing, and say whether the page is up to date
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measure import records
from bench.report.page import PAGE, PLOTS, block, replaced, result_files
from bench.report.results import Results
from bench.report.targets import judged


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("files", nargs="*", type=Path, metavar="FILE", help="result files (default: all in bench/results)")
    option("--page", type=Path, default=PAGE, help="the page (default: docs/performance.md)")
    option("--plots", type=Path, default=PLOTS, help="folder of the pictures (default: bench/results/plots)")
    option("--check", action="store_true", help="change nothing, and exit with 1 if the page is stale")
    chosen = parser.parse_args(arguments)
    if chosen.files and chosen.page.resolve() == PAGE:
        parser.error("docs/performance.md shows all result files; for some of them, choose another --page")
    files = chosen.files or result_files()
    if not files:
        print(f"there are no result files in {records.RESULTS}; run pytest bench/ first", file=sys.stderr)
        return 2
    old = chosen.page.read_text()
    new = replaced(old, block(files))
    if chosen.check:
        stale = "is stale: run python -m bench.report" if new != old else "is up to date"
        print(f"{chosen.page.name} {stale}")
        return int(new != old)
    chosen.page.write_text(new)
    from bench.report import plots  # the import of matplotlib takes a second

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
