"""Times candidate values of constants in `kernels/plan.py`, and prints them for each case, sorted by time.

    python -m bench.tune PARTIAL_CHANNELS=64,128,256
    python -m bench.tune "MEANS_TILE=(64,32,8),(64,64,8)" --run fwd_beta --case 128x2048x14x14-bfloat16-nchw

The command tries all combinations of the values.  It changes no file: choose, edit the plan and commit by
hand.
"""

import argparse
import ast
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ggam_fast.kernels import plan

import ggam_fast  # noqa: F401  (makes ggam_fast.kernels importable in a checkout)
from bench.measure import environment, roofline, timing
from bench.suite.cases import PASSES, gpu_cases
from bench.suite.workload import Workload
from bench.tools import options

Choice = dict[str, Any]


def candidates(text: str) -> tuple[str, list[Any]]:
    """The constant of the plan and its candidates, from the text NAME=v1,v2."""
    name, _, values = text.partition("=")
    if not isinstance(vars(plan).get(name), (int, tuple)) or isinstance(vars(plan)[name], bool):
        known = ", ".join(n for n, v in vars(plan).items() if n.isupper() or n.lstrip("_").isupper())
        raise argparse.ArgumentTypeError(f"NAME must be a constant of kernels/plan.py: {known}; got {name!r}")
    try:
        found = list(ast.literal_eval(f"({values},)"))
    except (SyntaxError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{name}= needs Python values separated by commas; got {values!r}"
        ) from None
    kind = type(vars(plan)[name])
    return name, [kind(*v) if hasattr(kind, "_fields") else kind(v) for v in found]


@contextmanager
def patched(choice: Choice) -> Iterator[None]:
    """The plan with these constants.  Results that it cached for the old ones are dropped."""
    before = {name: vars(plan)[name] for name in choice}
    try:
        _set(choice)
        yield
    finally:
        _set(before)


def _set(values: Choice) -> None:
    for name, value in values.items():
        setattr(plan, name, value)
    for function in vars(plan).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def median(work: Workload, run: str) -> float:
    """Seconds of the fused pass, in a CUDA graph if possible.  Parity is checked first."""
    peer = work.build("fused", run)
    work.check("fused", run, peer)
    spreads = work.measure({"fused": peer})["fused"].spreads
    return spreads["graph" if "graph" in spreads else "hot"].p50


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument(
        "constants",
        nargs="+",
        type=candidates,
        metavar="NAME=VALUE,...",
        help="a constant of kernels/plan.py and its candidates",
    )
    options.add_cases(parser, gpu_cases((32, 128), (torch.bfloat16,)))
    parser.add_argument("--run", nargs="+", choices=PASSES, default=["step"], help="passes (default: step)")
    chosen = parser.parse_args(arguments)
    bandwidth = timing.copy_bandwidth(environment.device())
    names = [name for name, _ in chosen.constants]
    for case, run in itertools.product(chosen.case, chosen.run):
        work, found = Workload(case, environment.device()), []
        for values in itertools.product(*(v for _, v in chosen.constants)):
            with patched(dict(zip(names, values, strict=True))):
                try:
                    found.append((median(work, run), values))
                except Exception as error:
                    print(f"{case} {run} {values}: {type(error).__name__}: {error}", flush=True)
        for seconds, values in sorted(found, key=lambda f: f[0]):
            shown = ", ".join(f"{n}={v}" for n, v in zip(names, values, strict=True))
            share = seconds / roofline.floor_seconds(case.bytes, run, bandwidth)
            print(f"{case} {run}: {seconds * 1e6:9.1f} us, {share:6.2f} x floor  {shown}", flush=True)


if __name__ == "__main__":
    main()
