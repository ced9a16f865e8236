"""The head on a CPU against the head of another commit, both in one process and in turns.

    python -m bench.against e3bd7a3
    python -m bench.against e3bd7a3 --seconds 10

The other commit's package is imported under another name.  Each row is a pass of a case of `pytest bench/`.
The two heads take turns of some milliseconds, so both see the same load of the machine.  The least time of
all turns counts, because load only adds to it.  The verdict is on this commit's time over the other's.

"step" is the head, GGAMLoss and backward; "fused" is fused_ggam_loss and backward.
"""

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

import ggam_fast
from bench.measure.verdict import verdict
from bench.suite.cases import Case, cpu_default
from bench.suite.peers import NUM_CLASSES
from bench.suite.workload import Workload
from bench.tools import options

ROOT = Path(__file__).parents[2]
LIMIT = 1.05
_TURN = 0.004  # seconds
OTHER = "ggam_other"


def imported(commit: str, folder: Path) -> ModuleType:
    """The package of a commit, unpacked into `folder` and imported as `ggam_other`."""
    packed = subprocess.run(
        ["git", "archive", commit, "ggam_fast", "kernels"], cwd=ROOT, capture_output=True, check=False
    )
    if packed.returncode:
        raise SystemExit(f"commit {commit!r} cannot be read: {packed.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    package = folder / OTHER
    (folder / "ggam_fast").rename(package)
    (folder / "kernels").rename(package / "kernels")
    for file in package.rglob("*.py"):
        file.write_text(file.read_text().replace("ggam_fast", OTHER))
    sys.path.insert(0, str(folder))
    try:
        return import_module(OTHER)
    finally:
        sys.path.remove(str(folder))


def call(package: ModuleType, work: Workload, run: str) -> Callable[[], object]:
    """One pass of the package's head on the workload."""
    case = work.case
    head = package.GGAMHead(
        case.c, NUM_CLASSES, backend="torch", input_fmt="NLC" if case.layout == "nlc" else "NCHW"
    )
    head.train(run in ("step", "fused"))
    x, leaf, target = work.features[0], work.leaves[0], work.target
    if run in ("fwd", "beta"):
        given = (x,) if run == "fwd" else (x, target)
        return torch.no_grad()(lambda: head(*given))
    loss_of = package.GGAMLoss(0.1)
    fused_loss = import_module(f"{package.__name__}.functional").fused_ggam_loss

    def step() -> None:
        loss = loss_of(head(leaf, target), target) if run == "step" else fused_loss(head, leaf, target)[0]
        loss.backward()
        leaf.grad = None
        head.zero_grad()

    return step


def in_turns(
    first: Callable[[], object], second: Callable[[], object], seconds: float
) -> tuple[float, float]:
    """The least time of each call in seconds."""
    calls = (first, second)
    for function in calls:
        for _ in range(3):
            function()
    began = time.perf_counter()
    first()
    repeats = max(1, int(_TURN / (time.perf_counter() - began)))
    least = [float("inf")] * 2
    end, order = time.perf_counter() + seconds, (0, 1)
    while time.perf_counter() < end or max(least) == float("inf"):
        for index in order:
            began = time.perf_counter()
            for _ in range(repeats):
                calls[index]()
            least[index] = min(least[index], (time.perf_counter() - began) / repeats)
        order = order[::-1]
    return least[0], least[1]


def rows(cases: list[Case]) -> list[tuple[Case, str]]:
    """The passes of each case; one image alone has no batch statistics, so it takes no step."""
    return [
        (case, run)
        for case in cases
        for run in (("fwd", "beta") if case.n == 1 else ("fwd", "beta", "step", "fused"))
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the rows, and return 1 if one of them is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.against", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("commit", help="the other commit, such as e3bd7a3")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for a row (default %(default)s)")
    options.add_cases(parser, list(dict.fromkeys(run.case for run in cpu_default())))
    given = parser.parse_args(arguments)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        other = imported(given.commit, Path(folder))
        for case, run in rows(given.case):
            work = Workload(case, torch.device("cpu"))
            before, now = in_turns(call(other, work, run), call(ggam_fast, work, run), given.seconds)
            line = verdict(f"{case} {run}", now / before, LIMIT, digits=3)
            missed += line.startswith("MISSED")
            print(f"{line}  {1e6 * before:.1f} us -> {1e6 * now:.1f} us", flush=True)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
