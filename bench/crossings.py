"""How often a guided step crosses from one file of the package to another, as a debugger shows it.

    python -m bench.crossings
    python -m bench.crossings --files

A crossing is a call of a function in another file of the package than the call before it: of the functions of
ggam_fast that a step enters, in their order, forward and backward, two neighbours in different files.
Returns do not count, nor what is called outside the package (torch, Triton), nor the kernels.  By this
count the drop-in step crossed its 12 files 154 times at commit e3bd7a3, and the fused step 116 times.

    recording    the first call with shapes, types and options that no call had before
    replayed     the third
    unrecorded   with the recorder switched off

Each on the Triton backend (no GPU is needed, see `host`), after a step of another batch, so that what happens
once in a process is not counted.  Generators and, before Python 3.12, comprehensions are calls too.
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
from ggam_fast import checks, recorded

from . import environment, host
from .cases import Case
from .workload import Workload

PACKAGE = Path(ggam_fast.__file__).parent
LIMITS = {"recording": 100, "replayed": 30, "unrecorded": 100}
STEPS = ("fused", "drop_in")


class Crossings(NamedTuple):
    times: int
    files: frozenset[str]


def crossings(call: Callable[[], Any], package: Path = PACKAGE) -> Crossings:
    """Those of one call, in this thread: backward runs in it as well."""
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
    """The crossings of one step in each of the three ways, the last where it can be had."""
    device, provider = environment.device(), host.STEPS[step]
    host.step(Workload(case._replace(n=case.n + 1), device), provider)()
    call = host.step(Workload(case, device), provider)
    yield "recording", crossings(call)
    call()
    yield "replayed", crossings(call)
    with mock.patch.object(recorded, "enabled", False):
        call()
        yield "unrecorded", crossings(call)


def verdict(step: str, way: str, found: Crossings) -> str:
    """One line: "met" or "MISSED", and what was found."""
    limit = LIMITS[way]
    start = "met   " if found.times <= limit else "MISSED"
    return f"{start} {step}, {way}: {found.times} crossings (at most {limit}) of {len(found.files)} files"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.crossings", description=__doc__.split("\n")[0])
    parser.add_argument("--case", type=Case.parse, default=host.CPU)
    parser.add_argument("--files", action="store_true", help="name the files too")
    chosen = parser.parse_args(arguments)
    if checks.TRITON_INTERPRETED:
        parser.error("TRITON_INTERPRET is set: steps would not be recorded")
    with nullcontext() if torch.cuda.is_available() else host.without_kernels():
        for step in STEPS:
            for way, found in measured(chosen.case, step):
                print(verdict(step, way, found), flush=True)
                for file in sorted(found.files) if chosen.files else ():
                    print(f"           {Path(file).relative_to(PACKAGE)}")


if __name__ == "__main__":
    main()
