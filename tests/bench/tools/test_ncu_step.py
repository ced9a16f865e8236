"""Only the last call is profiled."""

import sys

import pytest
import torch

from bench.tools import ncu_step


def test_one_call_is_between_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test replaces the profiler's marks and the device, so it needs no GPU."""
    seen: list[str] = []
    real = ncu_step.Workload

    class Watched(real):  # type: ignore[misc, valid-type]
        def call(self, peer: object) -> object:
            call = super().call(peer)  # type: ignore[arg-type]
            return lambda i: (seen.append("call"), call(i))

    monkeypatch.setattr(ncu_step, "Workload", lambda case, _: Watched(case, torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    monkeypatch.setattr(sys, "argv", ["ncu_step", "2x32x3x3-float32", "fwd", "--provider", "eager"])
    ncu_step.main()
    assert seen[-3:] == ["start", "call", "stop"]
    assert seen.count("call") > 1
