"""Percentiles, bytes, floor, cases."""

from types import SimpleNamespace

import pytest
import torch

from bench import floor, timing
from bench.cases import PASSES, Case, Run, cpu_default, gpu_cases, gpu_default, gpu_full


def test_percentiles() -> None:
    assert timing.spread([float(x) for x in range(101)]) == (20.0, 50.0, 80.0)
    assert timing.spread([3.0]) == (3.0, 3.0, 3.0)
    assert timing.spread([4.0, 1.0]) == pytest.approx((1.6, 2.5, 3.4))
    with pytest.raises(ValueError, match="samples"):
        timing.spread([])


@pytest.mark.parametrize(("seconds", "rounds"), [(1.0, 10), (0.25 / 50, 50), (1e-6, 200), (0.0, 200)])
def test_rounds_fit_the_budget(seconds: float, rounds: int) -> None:
    assert timing.rounds_for(seconds) == rounds


def test_a_slow_second_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slows down for good half-way: the ratio of two calls does not feel it."""
    now, started = 0.0, []

    def call(seconds: float) -> timing.Call:
        def run(_: int) -> None:
            nonlocal now
            started.append(seconds)
            now += seconds * (3 if now > 2 else 1)

        return run

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    short, long = timing.in_turns([call(0.01), call(0.02)])
    assert long.p50 / short.p50 == pytest.approx(2, rel=0.05)
    assert started.count(0.01) > 1.5 * started.count(0.02) > 200


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (Case(32, 2048, 14, 14), 25_690_112),  # 25.7 MB, as the method says
        (Case(32, 2048, 14, 14, torch.float32), 51_380_224),
        (Case(1, 1024, 32, 32, layout="nlc"), 2_097_152),
    ],
    ids=str,
)
def test_bytes(case: Case, size: int) -> None:
    """bytes(A) is what torch allocates; the passes' bytes are multiples of it."""
    assert floor.feature_bytes(case) == size
    assert torch.empty(case.n, case.c, case.h, case.w, dtype=case.dtype).nbytes == size
    counted = {run: floor.floor_bytes(case, run) / size for run in (*PASSES, "copy")}
    assert counted == {"fwd": 1, "fwd_beta": 2, "beta": 2, "step": 3, "copy": 2}


def test_floor() -> None:
    case = Case(128, 2048, 14, 14)
    assert floor.floor_seconds(case, "step", 3e12) == pytest.approx(3 * 102_760_448 / 3e12)
    with pytest.raises(ValueError, match="copy_bandwidth"):
        floor.floor_seconds(case, "step", 0.0)


@pytest.mark.parametrize("case", [*gpu_cases((1, 32)), Case(2, 3, 4, 5, torch.float64)], ids=str)
def test_case_text(case: Case) -> None:
    assert Case.parse(str(case)) == case


@pytest.mark.parametrize(
    "text", ["", "32x2048x14", "32x2048x14x14-half-nchw-", "1x2x3x4-bfloat16-chwn", "1x2x3x4-int"]
)
def test_what_is_no_case(text: str) -> None:
    with pytest.raises(ValueError, match="a case is"):
        Case.parse(text)


def test_the_default_is_part_of_the_full_grid() -> None:
    full, default = set(gpu_full()), list(dict.fromkeys(gpu_default()))
    assert set(default) <= full
    steps = {r.case for r in full if r.run == "step"}
    assert steps == {r.case for r in full if r.run == "beta"} == set(gpu_cases())
    headline = {r.case for r in default if r.run == "step" and r.provider == "fused"}
    assert headline >= set(gpu_cases(dtypes=(torch.bfloat16,)))


def test_nothing_is_timed_twice() -> None:
    for runs in (list(gpu_full()), list(cpu_default())):
        assert len(runs) == len(set(runs)) == len({str(r) for r in runs})
    assert str(Run(Case(1, 2, 3, 4), "fwd", "eager")) == "1x2x3x4-bfloat16-nchw-fwd-eager"
