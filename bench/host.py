"""How long the host takes to start a guided step, and each operator of it: microseconds until a call returns.

    python -m bench.host
    python -m bench.host --case 32x2048x14x14-bfloat16-nchw --compile

The device is idle before each call.  Without a GPU no kernel runs: a launch ends where the driver's part
begins.  torch's own operations do run, on the CPU, so the default case is tiny there.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import triton

from ggam_fast import checks, launch, ops

from . import environment, timing
from .cases import Case
from .workload import Workload

GPU = Case(32, 2048, 14, 14)
CPU = Case(4, 64, 4, 4, torch.float32)
STEPS = ("fused", "fused_modular", "eager")
COMPILED = ("fused_compiled", "compiled")


class _Nothing:
    """A compiled kernel that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_: None


@contextmanager
def without_kernels() -> Iterator[None]:
    """The kernels' backend on tensors of the CPU, which are left as they are."""
    with (
        mock.patch.object(triton.JITFunction, "run", return_value=_Nothing()),
        mock.patch.object(launch, "_serves_all_alike", return_value=True),
        mock.patch.object(checks, "TRITON_INTERPRETED", True),
        mock.patch.dict(os.environ, GGAM_FAST_BACKEND="triton"),
    ):
        yield


@contextmanager
def recorded() -> Iterator[list[tuple[str, Callable[[], Any]]]]:
    """The operators that run meanwhile, by name, each to be called again."""
    found: list[tuple[str, Callable[[], Any]]] = []

    def recorder(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found.append((name, lambda: operator(*arguments)))
            return operator(*arguments)

        return call

    operators = {k: v for k, v in vars(ops).items() if isinstance(v, torch._ops.OpOverload)}
    recorders = {k: recorder(v._schema.name.split("::")[1], v) for k, v in operators.items()}
    with mock.patch.multiple(ops, **recorders):
        yield found


def microseconds(call: Callable[[], Any], rounds: int) -> float:
    """Median until the call returns."""
    on_gpu = torch.cuda.is_available()
    timing.host_times(lambda _: call(), min(rounds, 20), on_gpu)
    return 1e6 * statistics.median(timing.host_times(lambda _: call(), rounds, on_gpu))


def lines(case: Case, compiled: bool, rounds: int) -> Iterator[str]:
    """The rows of the table: steps, then the operators of `fused` in their order."""
    work = Workload(case, environment.device())

    def step(provider: str) -> Callable[[], Any]:
        call = work.call(work.build(provider, "step"))
        return lambda: call(0)

    for provider in (*STEPS, *COMPILED * compiled):
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            yield f"| {provider} | {microseconds(step(provider), rounds):.0f} |"
    with recorded() as operators:
        step("fused")()
    with torch.no_grad():
        for name, call in operators:
            yield f"| ggam_fast::{name} | {microseconds(call, rounds):.1f} |"


def main(arguments: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--case", type=Case.parse, default=GPU if on_gpu else CPU)
    parser.add_argument("--compile", action="store_true", help="compiled steps too")
    parser.add_argument("--rounds", type=int, default=300, help="calls that a median is taken of")
    chosen = parser.parse_args(arguments)
    if checks.TRITON_INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter has no launches to time")
    with nullcontext() if on_gpu else without_kernels():
        print(f"{chosen.case}, torch {torch.__version__}, triton {triton.__version__}", end="")
        print("" if on_gpu else ", one thread, no kernel is launched", end="\n\n")
        print("| step, operator | us until it returns |\n| --- | --- |")
        if not on_gpu:
            torch.set_num_threads(1)
        for line in lines(chosen.case, chosen.compile, chosen.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
