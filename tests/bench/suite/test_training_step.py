"""Whole training steps with each head."""

from functools import partial

import pytest
import torch

pytest.importorskip("timm")

from bench.suite.training_step import CPU, PROVIDERS, TrainingStep


def test_whole_training_steps(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses = {}
    for provider in PROVIDERS:
        step = TrainingStep(provider, CPU._replace(size=32, n=2, autocast=torch.bfloat16), device)
        losses[provider] = [float(step()) for _ in range(2)]
        assert all(torch.isfinite(torch.tensor(losses[provider])))
        assert losses[provider][0] != losses[provider][1]  # the optimizer changed the weights
    assert losses["fused_compiled"] == pytest.approx(losses["fused"], rel=1e-3)
