"""The record of the machine and the commit."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bench.measure import environment
from bench.measure.environment import ROOT


def test_environment() -> None:
    now = environment.current()
    assert now.gpu
    assert now.commit
    assert now.utc.endswith("Z")
    assert now.threads >= 1


def test_a_copy_of_another_commit_is_told_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.source.cache_clear()
    monkeypatch.setenv("BENCH_COMMIT", "abc123")
    assert environment.source() == ("abc123", None)
    environment.source.cache_clear()


def test_a_copy_without_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    environment.source.cache_clear()
    monkeypatch.setenv("BENCH_COMMIT", "abc123")
    assert environment.source() == ("abc123", None)
    environment.source.cache_clear()


PAGE_FAULTS = """
import resource, sys, torch
from bench.measure import environment
if sys.argv[1] == "kept":
    environment.keep_freed_memory()
found = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 23), torch.ones(1 << 24)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*found)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its own rules")
def test_freed_memory_is_kept() -> None:
    def faults(how: str) -> list[int]:
        command = [sys.executable, "-c", PAGE_FAULTS, how]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [int(x) for x in done.stdout.split()]

    # Some allocations may still fault: memory between two free blocks can separate them, so the heap grows
    # again.
    assert min(faults("kept")) < min(faults("given back")) / 10
