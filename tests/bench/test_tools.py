"""The tools around the suite, as far as they run without a GPU."""

import argparse
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch

from bench import counters, kernel_times, timing, tune
from bench.cases import Case
from bench.environment import ROOT
from bench.workload import Workload

NCU = f"""==PROF== Connected to process 1
"ID","Process ID","Kernel Name","{counters.READ}","{counters.WRITTEN}","{counters.TIME}"
"","","","byte","byte","ns"
"0","1","forward_kernel","102,760,448","1,027,604.48","41,000"
"1","1","void other<float>(int, int)","51380224","0","2000"
"""


def test_counters_of_ncu() -> None:
    found = counters.parse(NCU)
    assert [k.name for k in found] == ["forward_kernel", "void other<float>(int, int)"]
    lines = list(counters.table(Case(128, 2048, 14, 14), "step", found))
    assert lines[0][2:] == ("forward_kernel", "1.000", "0.010", "41.00")
    assert lines[-1][2:] == ("all", "1.500", "0.010", "43.00")


@pytest.mark.parametrize(
    ("text", "message"), [("==ERROR== no", "no table"), ('"ID","Kernel Name"\n', "no column")]
)
def test_no_counters(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counters.parse(text)


def test_kernels_of_one_call() -> None:
    found = [kernel_times.Kernel(name, at, at + 3) for at, name in ((0, "a"), (20, "a"), (4, "b"), (25, "b"))]
    last = kernel_times.one_call(found, 2)
    assert [k.name for k in last] == ["a", "b"]
    assert last[0].start == 20
    assert kernel_times.lines(last)[-1].split() == ["2.00", "6.00", "all"]
    with pytest.raises(ValueError, match="4 kernels cannot be of 3 equal calls"):
        kernel_times.one_call(found, 3)


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


def test_whole_training_steps(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    from bench.training_step import CPU, PROVIDERS, TrainingStep

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses = {}
    for provider in PROVIDERS:
        step = TrainingStep(provider, CPU._replace(size=32, n=2, autocast=torch.bfloat16), device)
        losses[provider] = [float(step()) for _ in range(2)]
        assert all(torch.isfinite(torch.tensor(losses[provider])))
        assert losses[provider][0] != losses[provider][1]  # the optimizer moved something
    assert losses["fused_compiled"] == pytest.approx(losses["fused"], rel=1e-3)


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled head, whose gradients are tampered with, is refused; the others are timed."""
    pytest.importorskip("timm")
    from bench import bench_e2e, parity
    from bench.side_by_side import Timed
    from bench.training_step import CPU, TrainingStep

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


PAGE_FAULTS = """
import resource, sys, torch
from bench import environment
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

    # Not of every allocation: what lies between two blocks may part them, and the heap grows once more.
    assert min(faults("kept")) < min(faults("given back")) / 10
