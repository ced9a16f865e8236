"""The host's time: numbers are written, targets are judged, and calls take turns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench.measure import driver_stub
from bench.measure.environment import ROOT
from bench.tools import host

needs_stub = pytest.mark.skipif(
    torch.cuda.is_available() or driver_stub.compiler() is None,
    reason="the stub of the driver needs a C compiler, and no GPU",
)


@needs_stub
def test_numbers_are_written(tmp_path: Path) -> None:
    """The command runs in a process without the interpreter, which launches no kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    file = tmp_path / "host.json"
    command = [sys.executable, "-m", "bench.host", "--rounds", "2", "--case", "2x32x3x3-float32"]
    command += ["--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(file.read_text())
    assert found["case"] == "2x32x3x3-float32-nchw"
    assert all(found[name] for name in ("torch", "triton", "python", "cpu", "commit"))
    times = {"fused", "drop_in", "eager", "forward", "eager_forward"}
    assert found.keys() - {"case", "torch", "triton", "python", "cpu", "commit"} == {*times, "launches"}
    assert all(found[name] > 0 for name in times)
    assert found["launches"] > 2
    judged = [line for line in done.stdout.splitlines() if line.startswith(("met ", "MISSED "))]
    assert len(judged) == 4


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ({"fused": 20.0, "eager": 100.0}, "met    fused / eager: 0.200 (at most 0.2)"),
        ({"fused": 21.0, "eager": 100.0}, "MISSED fused / eager: 0.210 (at most 0.2)"),
        ({"drop_in_compiled": 30.0, "compiled": 40.0}, "       drop_in_compiled / compiled: 0.750"),
        ({"launches": 28}, "met    launches: 28 (at most 28)"),
        ({"launches": 29}, "MISSED launches: 29 (at most 28)"),
    ],
)
def test_targets(found: dict[str, float], line: str) -> None:
    assert list(host.report(found))[-1] == line


def test_targets_without_their_numbers() -> None:
    assert not any("compiled" in line for line in host.report({"fused": 1.0, "eager": 5.0}))


def test_calls_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "TURN", 2)
    order: list[str] = []
    found = host.microseconds({name: lambda name=name: order.append(name) for name in "ab"}, 4)
    assert "".join(order[-12:]) == "aaabbb" * 2
    assert found.keys() == {"a", "b"}
