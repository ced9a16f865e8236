"""A whole step is timed only if it trains as the authors' does."""

from functools import partial

import pytest
import torch

pytest.importorskip("timm")

from bench import bench_e2e
from bench.measure import parity, timing
from bench.measure.side_by_side import Timed
from bench.suite.training_step import CPU, TrainingStep


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test falsifies the gradients of the compiled head. It is refused, and the others are timed."""

    def tampered(step: TrainingStep) -> torch.Tensor:
        loss = right(step)
        for parameter in step.head.parameters():
            assert parameter.grad is not None
            parameter.grad *= 1.05
        return loss

    right = TrainingStep._fused_compiled
    monkeypatch.setattr(TrainingStep, "_fused_compiled", tampered)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(timing, "CPU_BUDGET", 0.1)
    found = bench_e2e.timed(("linear", "fused_compiled", "authors"), CPU._replace(size=32, n=2))
    assert isinstance(found["fused_compiled"], parity.Refused)
    for name in ("linear", "authors"):
        own = found[name]
        assert isinstance(own, Timed), own
        assert own.measured.spreads["hot"].p50 > 0
