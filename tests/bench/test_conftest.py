"""What the benchmarks share: one process, the time budget, the list of what was not measured."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.measure.environment import ROOT

pytest.importorskip("pytest_benchmark")


def test_beyond_the_budget_nothing_starts(tmp_path: Path) -> None:
    case = "4x2048x14x14-float32-nchw-step-fused"
    command = [sys.executable, "-m", "pytest", "bench/bench_head.py", "-k", case, "--budget", "0"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" in done.stdout
    assert "the budget of 0 s is spent" in done.stdout.split("not measured")[1]
    assert "workers" not in done.stdout  # timings need the machine to themselves
    assert not list(tmp_path.iterdir())
