"""How long the host takes to start a guided step: microseconds until a call returns, and their targets.

    python -m bench.host
    python -m bench.host --compile --json host.json
    python -m bench.host --case 32x2048x14x14-bfloat16-nchw

Without a GPU, launches end in a stub of the driver (`measure/driver_stub`), so only the driver's own time is
missing.  torch's operations then run on the CPU.  The default case is tiny, so they compute little.  The
result is the CPU time of one thread.  With a GPU, the device is idle before each call, and the result is the
time by the clock.

    fused, drop_in, eager        a guided step, forward and backward: `fused_ggam_loss`; the head, then
                                 `GGAMLoss`; the eager reference
    forward, eager_forward       the logits of one image, without gradients: the head, the eager reference
    fused_compiled, drop_in_compiled, compiled
                                 `fused`, `drop_in` and the reference's step inside torch.compile
    forward_compiled, compiled_forward
                                 `forward` and the reference's forward inside torch.compile
    launches                     kernels, copies and fills of `fused`, see `launches`

Each time is a median.  Calls take turns, so other processes of a shared machine affect all alike.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from bench.measure import driver_stub, environment, timing
from bench.measure.torch_launches import torch_launches
from bench.measure.verdict import verdict
from bench.suite.cases import Case
from bench.suite.workload import Workload
from bench.tools import options
from ggam_fast import checks, recorded
from ggam_fast.backends.triton import launch

GPU = Case(32, 2048, 14, 14)
CPU = Case(4, 64, 4, 4, torch.float32)
TURN = 10  # calls
STEPS = {"fused": "fused", "drop_in": "fused_modular", "eager": "eager"}
FORWARDS = {"forward": "fused", "eager_forward": "eager"}
COMPILED_STEPS = {
    "fused_compiled": "fused_compiled",
    "drop_in_compiled": "fused_modular_compiled",
    "compiled": "compiled",
}
COMPILED_FORWARDS = {"forward_compiled": "fused_compiled", "compiled_forward": "compiled"}
WITHOUT_GRADIENTS = {*FORWARDS, *COMPILED_FORWARDS}
Step = Callable[[], Any]


class Target(NamedTuple):
    """A target: `value` must be at most `limit` times `reference`, or `limit` if there is no reference.

    Without a limit, the ratio is only shown.
    """

    value: str
    reference: str | None
    limit: float | None

    def verdict(self, found: Mapping[str, float]) -> str | None:
        """A line that starts with "met" or "MISSED" if there is a limit.  If a value is missing, None."""
        if not {self.value, self.reference or self.value} <= found.keys():
            return None
        name, value, digits = self.value, found[self.value], 0
        if self.reference is not None:
            name, value, digits = f"{name} / {self.reference}", value / found[self.reference], 3
        if self.limit is None:
            return f"       {name}: {value:.{digits}f}"
        return verdict(name, value, self.limit, digits=digits)


TARGETS = (
    Target("fused", "eager", 0.2),
    Target("drop_in", "eager", 0.4),
    Target("forward", "eager_forward", 0.3),
    Target("fused_compiled", "compiled", 0.6),
    Target("drop_in_compiled", "compiled", None),
    Target("forward_compiled", "compiled_forward", None),
    Target("launches", None, 28),
)


@contextmanager
def without_kernels() -> Iterator[None]:
    """The Triton backend on tensors of the CPU.  Launches end in the stub and compute nothing."""
    with (
        driver_stub.active(),
        mock.patch.object(launch, "_compiled", {}),
        mock.patch.object(recorded, "_recordings", {}),
        mock.patch.object(launch, "serve_all_alike", return_value=True),
        mock.patch.object(checks, "TRITON_INTERPRETED", True),
        mock.patch.dict("os.environ", GGAM_FAST_BACKEND="triton"),
    ):
        yield


def step(work: Workload, provider: str, run: str = "step") -> Step:
    """One pass of a provider from `suite/peers.py`, on the first input."""
    call = work.call(work.build(provider, run))
    return lambda: call(0)


def forward(work: Workload, provider: str) -> Step:
    """Only the head's logits.  `microseconds` turns gradients off around it."""
    head_of, x, y = work.build(provider, "fwd").call, work.features[0], work.target
    return lambda: head_of(x, y)


def steps(case: Case, compiled: bool) -> dict[str, Step]:
    """The timed calls by name."""
    device = environment.device()
    work, one = Workload(case, device), Workload(case._replace(n=1), device)
    whole = STEPS | (COMPILED_STEPS if compiled else {})
    logits = FORWARDS | (COMPILED_FORWARDS if compiled else {})
    found = {name: step(work, provider) for name, provider in whole.items()}
    return found | {name: forward(one, provider) for name, provider in logits.items()}


def microseconds(calls: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """The median time of each call, over at least `rounds` calls in turns of TURN.

    The first call of a turn is not counted, because the caches then hold the code and data of other calls.
    """
    on_gpu = torch.cuda.is_available()
    for name, call in calls.items():
        with torch.set_grad_enabled(name not in WITHOUT_GRADIENTS):
            for _ in range(5):  # compiles, records and allocates
                call()
    gc.collect()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(-(-rounds // TURN)):
        for name, call in calls.items():
            with torch.set_grad_enabled(name not in WITHOUT_GRADIENTS):
                call()
                samples[name] += _on_gpu_times(call) if on_gpu else _cpu_times(call)
    return {name: 1e6 * statistics.median(own) for name, own in samples.items()}


def _on_gpu_times(call: Step) -> list[float]:
    return timing.host_times(lambda _: call(), TURN, synchronize=True)


def _cpu_times(call: Step) -> list[float]:
    """CPU time of this thread.  Other processes affect it only through the caches."""
    start = time.thread_time()
    for _ in range(TURN):
        call()
    # Reading the clock takes about 1 us, as long as three launches, so it is read once in each turn.
    return [(time.thread_time() - start) / TURN]


def launches(call: Step) -> int:
    """How many kernels, copies and fills a later call puts on the GPU.

    Without a GPU, it is the number of launches that reach the stub, plus `torch_launches`.
    """
    call()
    if torch.cuda.is_available():
        return timing.launches(lambda _: call()) or 0
    before = driver_stub.launch_count()
    call()
    return driver_stub.launch_count() - before + torch_launches(call)


def measured(case: Case, compiled: bool, rounds: int) -> dict[str, float]:
    """Microseconds by name, and the number of launches."""
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        calls = steps(case, compiled)
        return microseconds(calls, rounds) | {"launches": launches(calls["fused"])}


def report(found: Mapping[str, float]) -> Iterator[str]:
    """The lines of the table, and then those of the targets."""
    yield "| call | us until it returns |\n| --- | --- |"
    yield from (f"| {name} | {value:.0f} |" for name, value in found.items() if name != "launches")
    yield ""
    yield from filter(None, (target.verdict(found) for target in TARGETS))


def main(arguments: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    options.add_case(parser, GPU if on_gpu else CPU)
    parser.add_argument("--compile", action="store_true", help="time compiled steps too")
    parser.add_argument("--rounds", type=int, default=300, help="calls for each median (default: 300)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    chosen = parser.parse_args(arguments)
    if checks.TRITON_INTERPRETED:
        parser.error("TRITON_INTERPRET must be unset, because the interpreter launches nothing")
    with nullcontext() if on_gpu else without_kernels():
        if not on_gpu:
            torch.set_num_threads(1)
            # Unwritten memory may hold denormal numbers, which are slow to add.
            torch.set_flush_denormal(True)
        machine = {
            "case": str(chosen.case), "torch": torch.__version__, "triton": triton.__version__,
            "python": platform.python_version(), "cpu": environment.cpu(),
            "commit": environment.source()[0],
        }  # fmt: skip
        if on_gpu:
            machine["gpu"] = torch.cuda.get_device_name()
        print(*(f"{k} {v}" for k, v in machine.items()), sep=", ")
        print("" if on_gpu else "one thread; launches end in a stub of the driver\n", flush=True)
        found = measured(chosen.case, chosen.compile, chosen.rounds)
    for line in report(found):
        print(line)
    if chosen.json:
        chosen.json.write_text(json.dumps(machine | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
