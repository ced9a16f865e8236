"""A whole training step: backbone, head, loss, backward, optimizer.

On a GPU ResNet-50 at 448 with 32 images, bfloat16 autocast, channels-last, random weights; on a CPU a
ResNet-10 on small images, which tests the code and says little about speed.  Peak memory is the whole step's.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from bench import environment, parity, rows, timing
from bench.training_step import CPU, GPU, PROVIDERS, Setting, TrainingStep

ALLOWED = 1e-2  # the backbone's convolutions may use TF32 and other algorithms from run to run
ENERGY_SECONDS = 3.0
"""How long to run for one reading of the energy counter, which moves every 20 to 100 ms."""


def check(provider: str, setting: Setting) -> float:
    """The authors' loss and head gradients are ours, in float32 on few images; the plain head has no peer."""
    if provider == "linear":
        return 0.0
    found, ours = {}, "fused" if provider == "authors" else provider
    for name in (ours, "authors"):
        one = TrainingStep(name, setting._replace(autocast=None, n=min(setting.n, 8)), environment.device())
        found[name] = {"loss": one.loss(), **{n: p.grad for n, p in one.head.named_parameters()}}
    worst = max(parity.errors(found[ours], found["authors"]).values())
    if not worst <= ALLOWED:
        raise parity.Refused(f"{ours} and authors are {worst:.1e} apart; allowed are {ALLOWED:.0e}")
    return worst / ALLOWED


def energy_per_step(step: TrainingStep) -> float | None:
    """Joules of the whole GPU; None where its counter cannot be read."""
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


class Timed(NamedTuple):
    """A provider whose step was right, and how long it takes."""

    step: TrainingStep
    parity: float
    spreads: dict[str, timing.Spread]


@functools.lru_cache(maxsize=1)
def timed(providers: tuple[str, ...], setting: Setting) -> dict[str, Timed | Exception]:
    """Each provider checked, built, and timed with the others, or why it was not."""
    found: dict[str, Timed | Exception] = {}
    shares: dict[str, float] = {}
    steps: dict[str, TrainingStep] = {}
    # Building one may make the compiler forget the others: the checks, which build theirs, come first.
    for name in providers:
        with timing.failure_in(found, name):
            shares[name] = check(name, setting)
    for name in shares:
        with timing.failure_in(found, name):
            steps[name] = TrainingStep(name, setting, environment.device())
            steps[name]()
    calls = [lambda _, step=step: step() for step in steps.values()]
    measured = timing.measure_all(calls, 1, [False] * len(calls))
    return found | {
        name: Timed(step, shares[name], spreads)
        for (name, step), (spreads, _) in zip(steps.items(), measured, strict=True)
    }


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_e2e(
    request: pytest.FixtureRequest,
    benchmark: Any,
    provider: str,
    write: Callable[[list[rows.Row]], None],
    leave_out: Callable[[str], None],
) -> None:
    setting: Setting = GPU if torch.cuda.is_available() else CPU
    together = [provider]  # on a CPU all that are selected
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
    else:
        mine = [item for item in request.session.items if item.path == request.path]
        together = [item.callspec.params["provider"] for item in mine]
    own = timed(tuple(together), setting)[provider]
    if isinstance(own, Exception):
        raise own
    step, share, spreads = own
    peak = timing.peak_bytes(lambda _: step()) / 2**20
    energy = energy_per_step(step)
    if energy is None:
        leave_out("no energy counter")
    with step.autocast():
        h, w = step.backbone(step.images).shape[2:]
    kind = "bfloat16" if setting.autocast else "float32"
    found = [
        rows.Row(
            setting.backbone, provider, "e2e", setting.n, step.channels, h, w, kind, "channels_last", name,
            *(x * 1e6 for x in s), None, None, None, None, peak, timing.launches(lambda _: step()),
            environment.current(), None, share, None if name == "host" else setting.n / s.p50,
            None if energy is None else energy / setting.n,
        )
        for name, s in spreads.items()
        if name != "cold"  # the images are one buffer, and the step is far larger than any cache
    ]  # fmt: skip
    write(found)
    benchmark.group = f"e2e {setting.backbone} {setting.n}x3x{setting.size}x{setting.size}"
    benchmark.extra_info.update(provider=provider, images_per_s=setting.n / spreads["hot"].p50)
    benchmark.pedantic(lambda: (step(), torch.cuda.is_available() and torch.cuda.synchronize()), rounds=3)
