"""How often a guided step passes from one file of the package to another, as seen in a debugger.

    python -m bench.crossings
    python -m bench.crossings --files

The tool lists the functions of ggam_fast that a step enters, in their order, forward and backward.  Two
neighbours of the list in different files are one crossing.  Returns do not count.  Calls outside the package
(torch, Triton) and the kernels do not count either.  At commit e3bd7a3 the drop-in step crossed its 12 files
154 times, and the fused step 116 times.

    recording    the first call with new shapes, types and options
    replayed     the third such call
    unrecorded   a call with the recorder switched off

All run on the Triton backend, and no GPU is needed (see `host`).  A step of another batch size runs first, so
the work that happens once in a process does not count.  Generators count as calls.  Before Python 3.12,
comprehensions do too.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch

import ggam_fast
from bench.measure import environment
from bench.measure.verdict import verdict
from bench.suite.cases import Case
from bench.suite.workload import Workload
from bench.tools import host, options
from ggam_fast import checks, recorded

PACKAGE = Path(ggam_fast.__file__).parent
LIMITS = {"recording": 100, "replayed": 30, "unrecorded": 100}
STEPS = ("fused", "drop_in")


class Crossings(NamedTuple):
    times: int
    files: frozenset[str]


def crossings(call: Callable[[], Any], package: Path = PACKAGE) -> Crossings:
    """The crossings of one call.  Its backward also runs in this thread."""
    inside = f"{package}/"
    kernels = f"{package}/kernels/"
    entered: list[str] = []

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            file = frame.f_code.co_filename
            if file.startswith(inside) and not file.startswith(kernels):
                entered.append(file)

    before = sys.getprofile()
    with torch.autograd.set_multithreading_enabled(False):
        sys.setprofile(trace)
        try:
            call()
        finally:
            sys.setprofile(before)
    times = sum(a != b for a, b in pairwise(entered))
    return Crossings(times, frozenset(entered))


def measured(case: Case, step: str) -> Iterator[tuple[str, Crossings]]:
    """The crossings of one step in each of the three ways."""
    device, provider = environment.device(), host.STEPS[step]
    host.step(Workload(case._replace(n=case.n + 1), device), provider)()
    call = host.step(Workload(case, device), provider)
    yield "recording", crossings(call)
    call()
    yield "replayed", crossings(call)
    with mock.patch.object(recorded, "enabled", False):
        call()
        yield "unrecorded", crossings(call)


def judged(step: str, way: str, found: Crossings) -> str:
    """A line with "met" or "MISSED", and the number of crossings."""
    return verdict(
        f"{step}, {way}, crossings between {len(found.files)} files", found.times, LIMITS[way], digits=0
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.crossings", description=__doc__.split("\n")[0])
    options.add_case(parser, host.CPU)
    parser.add_argument("--files", action="store_true", help="also list the files")
    chosen = parser.parse_args(arguments)
    if checks.TRITON_INTERPRETED:
        parser.error("TRITON_INTERPRET must be unset, because the interpreter records no steps")
    with nullcontext() if torch.cuda.is_available() else host.without_kernels():
        for step in STEPS:
            for way, found in measured(chosen.case, step):
                print(judged(step, way, found), flush=True)
                for file in sorted(found.files) if chosen.files else ():
                    print(f"           {Path(file).relative_to(PACKAGE)}")


if __name__ == "__main__":
    main()
