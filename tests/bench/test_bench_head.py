"""The benchmarks of the head: which tests are collected, and that they run in one process."""

import subprocess
import sys

import pytest
import torch

from bench.measure.environment import ROOT
from bench.suite.cases import cpu_default, gpu_default

pytest.importorskip("pytest_benchmark")


def test_the_default_runs_are_collected() -> None:
    command = [sys.executable, "-m", "pytest", "bench/bench_head.py", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = gpu_default() if torch.cuda.is_available() else cpu_default()
    expected = [f"bench/bench_head.py::bench_head[{run}]" for run in dict.fromkeys(runs)]
    assert [line for line in done.stdout.splitlines() if "::" in line] == expected
