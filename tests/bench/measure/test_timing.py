"""Percentiles, rounds, and turns on a slow machine."""

from types import SimpleNamespace

import pytest
import torch

from bench.measure import timing


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
    """If a machine becomes slow half-way and stays slow, the ratio of two calls does not change."""
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


def test_peak_memory(device: torch.device) -> None:
    """The peak has the two tensors that live at once, and not what the call freed before."""

    def call(_: int) -> None:
        torch.ones(1 << 16, device=device)
        _, _ = (torch.ones(1 << 18, device=device) for _ in range(2))

    assert 2 << 20 <= timing.peak_bytes(call) < 3 << 20


def test_first_line() -> None:
    assert timing.first_line(ValueError("bad\nmore")) == "ValueError: bad"
    assert timing.first_line(KeyError()) == "KeyError: "
