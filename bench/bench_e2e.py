"""Times a whole training step: backbone, head, loss, backward, optimizer.

On a GPU the backbone is a ResNet-50 with random weights, on 32 images of 448 x 448, channels-last, under
bfloat16 autocast.  On a CPU it is a ResNet-10 on small images.  That tests the code and says little about
speed.  Peak memory is that of the whole step.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.measure import environment, parity, records, side_by_side, timing
from bench.measure.side_by_side import Timed, take
from bench.suite.training_step import CPU, GPU, PROVIDERS, Setting, TrainingStep

ALLOWED = 1e-2  # convolutions may use TF32, and their algorithm may change between runs
ENERGY_SECONDS = 3.0
"""Seconds of one energy reading. The counter changes only every 20 to 100 ms."""


def check(provider: str, setting: Setting) -> float:
    """The largest difference from the authors' loss and head gradients, in float32 on few images.

    It is a share of the allowed difference.  Above 1, Refused is raised.  The plain head has no peer.
    """
    if provider == "linear":
        return 0.0
    found, ours = {}, "fused" if provider == "authors" else provider
    for name in (ours, "authors"):
        one = TrainingStep(name, setting._replace(autocast=None, n=min(setting.n, 8)), environment.device())
        found[name] = {"loss": one.loss(), **{n: p.grad for n, p in one.head.named_parameters()}}
    worst = max(parity.errors(found[ours], found["authors"]).values())
    if not worst <= ALLOWED:
        raise parity.Refused(f"{ours} and authors must agree to {ALLOWED:.0e}; they differ by {worst:.1e}")
    return worst / ALLOWED


def energy_per_step(step: TrainingStep) -> float | None:
    """Joules of the whole GPU for one step, or None if its counter cannot be read."""
    if not torch.cuda.is_available() or environment.energy_joules() is None:
        return None
    torch.cuda.synchronize()
    before, start, count = environment.energy_joules(), time.perf_counter(), 0
    while time.perf_counter() - start < ENERGY_SECONDS:
        step()
        torch.cuda.synchronize()
        count += 1
    after = environment.energy_joules()
    assert before is not None
    assert after is not None
    return (after - before) / count


def _call(step: TrainingStep) -> timing.Call:
    return lambda _: step()


@functools.lru_cache(maxsize=1)
def timed(providers: tuple[str, ...], setting: Setting) -> dict[str, Timed[TrainingStep] | Exception]:
    """The times of all providers.  Each provider's test takes its own from here."""
    return side_by_side.timed(
        providers,
        build=lambda name: TrainingStep(name, setting, environment.device()),
        check=lambda name, _: check(name, setting),
        measure=lambda steps: timing.measure({name: _call(step) for name, step in steps.items()}, 1),
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_e2e(
    benchmark: Any,
    provider: str,
    beside: list[str],
    write: Callable[[list[records.Record]], None],
    leave_out: Callable[[str], None],
) -> None:
    setting: Setting = GPU if torch.cuda.is_available() else CPU
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
    own = take(timed(tuple(beside), setting), provider)
    step = own.peer
    peak = timing.peak_bytes(_call(step)) / 2**20
    energy = energy_per_step(step)
    if energy is None:
        leave_out("energy: this GPU has no energy counter")
    with step.autocast():
        h, w = step.backbone(step.images).shape[2:]
    kind = "bfloat16" if setting.autocast else "float32"
    found = [
        records.Record(
            setting.backbone, provider, "e2e", setting.n, step.channels, h, w, kind, "channels_last", name,
            *(x * 1e6 for x in s), None, None, None, None, peak, timing.launches(_call(step)),
            environment.current(), None, own.parity, None if name == "host" else setting.n / s.p50,
            None if energy is None else energy / setting.n,
        )
        for name, s in own.measured.spreads.items()
        if name != "cold"  # one buffer of images suffices, because a step is far larger than any cache
    ]  # fmt: skip
    write(found)
    benchmark.group = f"e2e {setting.backbone} {setting.n}x3x{setting.size}x{setting.size}"
    benchmark.extra_info.update(provider=provider, images_per_s=setting.n / own.measured.spreads["hot"].p50)
    benchmark.pedantic(lambda: (step(), torch.cuda.is_available() and torch.cuda.synchronize()), rounds=3)
