"""How long a pass and each of its kernels take, in replays of a CUDA graph (needs a GPU).

    python -m bench.kernel_times
    python -m bench.kernel_times --case 128x2048x14x14-bfloat16-nchw --provider fused --run fwd

Prints the median of a call without the profiler, then a line for each kernel of one profiled call, in order:
the gap after the kernel before it, and its duration.  All times are microseconds.
"""

import argparse
import sys
from typing import NamedTuple

import torch

from bench.measure import environment, timing
from bench.suite.cases import PASSES, Case
from bench.suite.workload import Workload
from bench.tools import options

CAPTURABLE = ("fused", "fused_modular", "fused_compiled", "eager", "compiled", "compiled_closed_form")
CASES = [Case(128, 2048, 14, 14), Case(32, 2048, 14, 14)]


class Kernel(NamedTuple):
    """One kernel, copy or fill; times in microseconds."""

    name: str
    start: float
    end: float


def one_call(kernels: list[Kernel], calls: int) -> list[Kernel]:
    """The kernels of the last call, out of the kernels of `calls` equal calls."""
    if not kernels or len(kernels) % calls:
        raise ValueError(f"{len(kernels)} kernels do not divide into {calls} equal calls")
    return sorted(kernels, key=lambda k: k.start)[-(len(kernels) // calls) :]


def lines(kernels: list[Kernel]) -> list[str]:
    """A line for each kernel with gap, duration and name.  The last line has the sums."""
    ends = [kernels[0].start, *(k.end for k in kernels)]
    gaps = [k.start - end for k, end in zip(kernels, ends, strict=False)]
    took = [k.end - k.start for k in kernels]
    rows = [(gap, us, k.name[:80]) for gap, us, k in zip(gaps, took, kernels, strict=True)]
    return [f"{gap:6.2f} {us:8.2f}  {name}" for gap, us, name in [*rows, (sum(gaps), sum(took), "all")]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_times", description=__doc__.split("\n")[0])
    options.add_cases(parser, CASES)
    parser.add_argument("--run", choices=PASSES, default="step", help="the pass (default: step)")
    parser.add_argument(
        "--provider",
        choices=CAPTURABLE,
        default="fused_compiled",
        help="the provider, see bench/suite/peers.py (default: fused_compiled)",
    )
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.kernel_times needs a GPU, and torch finds none", file=sys.stderr)
        return 3
    torch._dynamo.config.trace_autograd_ops = True
    for case in chosen.case:
        work = Workload(case, environment.device())
        peer = work.build(chosen.provider, chosen.run)
        work.check(chosen.provider, chosen.run, peer)
        call, count = work.call(peer), len(work.features)
        median = timing.spread(timing.graph_times(call, count)).p50 * 1e6
        print(f"\n{case} {chosen.run} {chosen.provider}: {median:.1f}")
        events = timing.on_gpu(timing.capture(call, count).replay)
        kernels = [Kernel(e.name, e.time_range.start, e.time_range.end) for e in events]
        print("\n".join(lines(one_call(kernels, count))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
