"""Constants of the plan are replaced, timed and put back."""

import argparse

import pytest
import torch

from bench.measure import timing
from bench.suite.cases import Case
from bench.suite.workload import Workload

pytest.importorskip("triton")

from bench.tools import tune


def test_tuned_constants_are_put_back() -> None:
    def cut() -> tuple[int, ...]:
        return tune.plan.channel_sum(1024, 196, 2, tune.plan.POSITIONS_FIRST)

    before = tune.plan.PARTIAL_CHANNELS, cut()
    name, values = tune.candidates("PARTIAL_CHANNELS=64,512")
    assert (name, values) == ("PARTIAL_CHANNELS", [64, 512])
    with tune.patched({name: 64}):
        assert cut()[0] == 64
    assert (tune.plan.PARTIAL_CHANNELS, cut()) == before


def test_a_constant_of_several_numbers() -> None:
    _, values = tune.candidates("MEANS_TILE=(64,32,8),(32,32,4)")
    assert values == [tune.plan.Tile(64, 32, 8), tune.plan.Tile(32, 32, 4)]


@pytest.mark.parametrize("text", ["NOTHING=1", "blocks=1", "PARTIAL_CHANNELS=x y"])
def test_what_cannot_be_tuned(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        tune.candidates(text)


def test_a_tuned_pass_is_timed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CPU_TURNS", (2, 3))
    work = Workload(Case(2, 32, 4, 4, torch.float32), device)
    with tune.patched({"PARTIAL_CHANNELS": 256}):
        assert tune.median(work, "fwd") > 0
