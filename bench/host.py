"""How long the host takes to start a guided step: microseconds until a call returns, held against bars.

    python -m bench.host
    python -m bench.host --compile --json host.json
    python -m bench.host --case 32x2048x14x14-bfloat16-nchw

Without a GPU launches end in a stub of the driver (`driver_stub`), so that all but the driver's own time is
real; torch's own operations run on the CPU, so the default case is tiny there, and what counts is the CPU
time of the one thread.  With a GPU the device is idle before each call, and what counts is the clock.

    fused, drop_in, eager        a guided step, forward and backward: `fused_ggam_loss`; the head, then
                                 `GGAMLoss`; the eager reference
    forward, eager_forward       the logits of one image, without gradients: the head, the eager reference
    fused_compiled, drop_in_compiled, compiled
                                 `fused`, `drop_in` and the reference's step inside torch.compile
    forward_compiled, compiled_forward
                                 `forward` and the reference's inside torch.compile
    launches                     kernels, copies and fills of `fused`, see `launches`

Calls are timed in turns, so that all feel alike what a shared machine does; each time is a median.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from ggam_fast import checks, recorded
from ggam_fast.backends.triton import launch

from . import driver_stub, environment, timing
from .cases import Case
from .workload import Workload

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


class Bar(NamedTuple):
    """`value` is at most `limit` times `beside`, or at most `limit` where that is None; without a limit the
    ratio is told."""

    value: str
    beside: str | None
    limit: float | None

    def verdict(self, found: Mapping[str, float]) -> str | None:
        """One line, "met" or "MISSED" first if there is a limit; None if the values are not among what was
        found."""
        if not {self.value, self.beside or self.value} <= found.keys():
            return None
        value = found[self.value] / (found[self.beside] if self.beside else 1)
        name = f"{self.value} / {self.beside}" if self.beside else self.value
        shown = f"{value:.3f}" if self.beside else f"{value:.0f}"
        if self.limit is None:
            return f"       {name}: {shown}"
        return f"{'met   ' if value <= self.limit else 'MISSED'} {name}: {shown} (at most {self.limit:g})"


BARS = (
    Bar("fused", "eager", 0.2),
    Bar("drop_in", "eager", 0.4),
    Bar("forward", "eager_forward", 0.3),
    Bar("fused_compiled", "compiled", 0.6),
    Bar("drop_in_compiled", "compiled", None),
    Bar("forward_compiled", "compiled_forward", None),
    Bar("launches", None, 28),
)


@contextmanager
def without_kernels() -> Iterator[None]:
    """The kernels' backend on tensors of the CPU, which are left as they are: launches end in the stub."""
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
    """One pass of a provider of `peers`, on the first input."""
    call = work.call(work.build(provider, run))
    return lambda: call(0)


def forward(work: Workload, provider: str) -> Step:
    """The head's logits alone; `microseconds` disables gradients, as a caller's loop does once."""
    head_of, x, y = work.build(provider, "fwd").call, work.features[0], work.target
    return lambda: head_of(x, y)


def steps(case: Case, compiled: bool) -> dict[str, Step]:
    """What is timed, by name."""
    device = environment.device()
    work, one = Workload(case, device), Workload(case._replace(n=1), device)
    whole = STEPS | (COMPILED_STEPS if compiled else {})
    logits = FORWARDS | (COMPILED_FORWARDS if compiled else {})
    found = {name: step(work, provider) for name, provider in whole.items()}
    return found | {name: forward(one, provider) for name, provider in logits.items()}


def microseconds(calls: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """The median of each over turns of TURN calls, of at least `rounds` calls.  The first call of a turn is
    not counted: it finds the others' code and data in the caches."""
    on_gpu = torch.cuda.is_available()
    for name, call in calls.items():
        with torch.set_grad_enabled(name not in WITHOUT_GRADIENTS):
            for _ in range(5):  # compiles; records; takes memory
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
    """Of this thread alone: others on the machine do not count, but for what they do to its caches."""
    start = time.thread_time()
    for _ in range(TURN):
        call()
    # One reading of the clock takes about 1 us, as long as three launches.
    return [(time.thread_time() - start) / TURN]


def launches(call: Step) -> int:
    """What one later call puts on the GPU: counted there if there is one, else the stub's launches and
    `torch_launches`, backward with its first gradient included."""
    call()
    if torch.cuda.is_available():
        return timing.launches(lambda _: call()) or 0
    before = driver_stub.launch_count()
    call()
    return driver_stub.launch_count() - before + torch_launches(call)


def torch_launches(call: Step) -> int:
    """How many of torch's own operations in a call would launch a kernel (a copy, a fill) on a GPU.

    Those with a kernel of their own in torch's dispatcher, looked at from outside in, one launch each
    whatever they call in turn: `softmax` is `_softmax`, 1; `mean` is 1; `clone` is `copy_`, 1.  Not what only
    makes a tensor or says how one is read: views, `detach`, `empty` and its like, `resize_`, `set_`.
    Reading a value back (`item`) is a copy: 1.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        call()
    return sum(_launches_of(event) for event in record.events() or [] if event.cpu_parent is None)


def _launches_of(event: Any) -> int:
    if event.name.startswith("aten::") and _launches_itself(event.name):
        return 1
    return sum(_launches_of(child) for child in event.cpu_children)


_ONE_FOR_ALL_DEVICES = ("aten::copy_",)  # composed, as far as the dispatcher knows
_NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::_empty", "aten::resize", "aten::set_")


@cache
def _launches_itself(name: str) -> bool:
    if name in _ONE_FOR_ALL_DEVICES:
        return True
    overloads = torch._C._jit_get_schemas_for_operator(name)
    is_view = any(r.alias_info and not r.alias_info.is_write for s in overloads for r in s.returns)
    if is_view or name.startswith(_NO_LAUNCH):
        return False
    names = [f"{name}.{s.overload_name}" if s.overload_name else name for s in overloads]
    # The CPU's kernels are always there to ask for; what has one has one for a GPU.
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU") for full in names)


def measured(case: Case, compiled: bool, rounds: int) -> dict[str, float]:
    """Microseconds by name, and the count of launches."""
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        calls = steps(case, compiled)
        return microseconds(calls, rounds) | {"launches": launches(calls["fused"])}


def report(found: Mapping[str, float]) -> Iterator[str]:
    """The table, then the bars."""
    yield "| call | us until it returns |\n| --- | --- |"
    yield from (f"| {name} | {value:.0f} |" for name, value in found.items() if name != "launches")
    yield ""
    yield from filter(None, (bar.verdict(found) for bar in BARS))


def main(arguments: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--case", type=Case.parse, default=GPU if on_gpu else CPU)
    parser.add_argument("--compile", action="store_true", help="compiled steps too")
    parser.add_argument("--rounds", type=int, default=300, help="calls that a median is taken of")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    chosen = parser.parse_args(arguments)
    if checks.TRITON_INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter has no launches to time")
    with nullcontext() if on_gpu else without_kernels():
        if not on_gpu:
            torch.set_num_threads(1)
            torch.set_flush_denormal(True)  # what no kernel has written may be denormal, and slow to add up
        machine = {
            "case": str(chosen.case), "torch": torch.__version__, "triton": triton.__version__,
            "python": platform.python_version(), "cpu": environment._cpu(),
            "commit": environment.source()[0],
        }  # fmt: skip
        if on_gpu:
            machine["gpu"] = torch.cuda.get_device_name()
        print(*(f"{k} {v}" for k, v in machine.items()), sep=", ")
        print("" if on_gpu else "one thread, launches end in a stub of the driver\n", flush=True)
        found = measured(chosen.case, chosen.compile, chosen.rounds)
    for line in report(found):
        print(line)
    if chosen.json:
        chosen.json.write_text(json.dumps(machine | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
