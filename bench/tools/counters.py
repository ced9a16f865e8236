"""Bytes that each kernel reads from and writes to device memory, counted by ncu and divided by bytes(A).

    python -m bench.counters OUT.csv
    python -m bench.counters OUT.csv --case 256x2048x14x14-bfloat16-nchw --run step

Caches stay as the program leaves them (`--cache-control none`), so a read that hits L2 is not counted.
Clocks are not locked.
"""

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.measure.environment import ROOT
from bench.suite.cases import PASSES, Case
from bench.tools import options

READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
CASES = [
    Case(128, 2048, 14, 14),
    Case(128, 2048, 14, 14, layout="channels_last"),
    Case(128, 512, 28, 28),
    Case(128, 1024, 32, 32, layout="nlc"),
]
RUNS = ("fwd", "step")


class Kernel(NamedTuple):
    """The bytes that one launch reads and writes, and its time."""

    name: str
    read: float
    written: float
    nanoseconds: float


def parse(text: str) -> list[Kernel]:
    """The launches in the output of `ncu --csv --page raw --print-units base`.

    That output is a header, a line of units and lines of values.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if not lines:
        raise ValueError("ncu must print lines of quoted CSV; it printed no table")
    reader = csv.DictReader(lines)
    missing = {"Kernel Name", READ, WRITTEN, TIME} - set(reader.fieldnames or ())
    if missing:
        raise ValueError(f"ncu's table must have all needed columns; it lacks {', '.join(sorted(missing))}")
    found = [row for row in reader if row["ID"]]  # the line of units has no ID

    def number(row: dict[str, str], column: str) -> float:
        return float(row[column].replace(",", ""))

    return [Kernel(r["Kernel Name"], *(number(r, c) for c in (READ, WRITTEN, TIME))) for r in found]


def count(case: Case, run: str, limit: float) -> list[Kernel]:
    """Profile one pass in its own process."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off",
               "--metrics", ",".join((READ, WRITTEN, TIME)), "--cache-control", "none",
               "--clock-control", "none"]  # fmt: skip
    with tempfile.NamedTemporaryFile("r", suffix=".csv") as log:
        command += ["--log-file", log.name, sys.executable, "-m", "bench.ncu_step", str(case), run]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        text = log.read()
    if done.returncode:
        raise RuntimeError(f"ncu exited with {done.returncode}: {(done.stderr or done.stdout + text)[-500:]}")
    return parse(text)


def table(case: Case, run: str, kernels: Iterable[Kernel]) -> Iterator[tuple[str, ...]]:
    """A line for each launch, and then their sum.  Bytes are divided by bytes(A)."""
    size = case.bytes
    kernels = list(kernels)
    total = Kernel("all", *(sum(k[i] for k in kernels) for i in (1, 2, 3)))
    for k in (*kernels, total):
        yield (str(case), run, k.name, f"{k.read / size:.3f}", f"{k.written / size:.3f}",
               f"{k.nanoseconds / 1000:.2f}")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counters", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT.csv", help="the file to write")
    options.add_cases(parser, CASES)
    parser.add_argument("--run", nargs="+", choices=PASSES, default=RUNS, help="passes (default: fwd step)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one pass (default: 120)")
    chosen = parser.parse_args(arguments)
    if shutil.which("ncu") is None:
        print(
            "nothing was counted, because ncu is not installed; it is a part of Nsight Compute",
            file=sys.stderr,
        )
        return 3
    failed = 0
    with open(chosen.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "pass", "kernel", "read / bytes(A)", "written / bytes(A)", "us"))
        for case in chosen.case:
            for run in chosen.run:
                try:
                    lines = list(table(case, run, count(case, run, chosen.limit)))
                except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
                    failed += 1
                    print(f"{case} {run}: {error}", flush=True)
                    continue
                writer.writerows(lines)
                file.flush()
                print(*lines[-1], sep="  ", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
