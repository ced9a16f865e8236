"""How long a user's first step takes in a new process, with empty and with warm caches.

    python -m bench.first_call
    python -m bench.first_call --case 32x2048x14x14-bfloat16-nchw --compile

The time runs from the call to its end on the device.  Imports and the start of the device are not part of it.
`--compile` times the step inside torch.compile.  It also times the smallest compiled step, (x * x).sum().
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bench.measure.environment import ROOT
from bench.suite.cases import Case
from bench.tools import options

DEFAULT = Case(32, 2048, 14, 14)
STEPS = ("fused", "fused_compiled", "smallest")


def child(case: Case, step: str) -> dict[str, float]:
    """Seconds for the start of the device, the first step, and the second step."""
    start = time.perf_counter()
    import torch

    from bench.measure import environment
    from bench.suite.workload import Workload

    device = environment.device()
    work = Workload(case, device)
    x, y = work.leaves[0], work.target
    if step == "smallest":
        square = torch.compile(lambda x: (x * x).sum(), fullgraph=True)
        call: Callable[[], Any] = lambda: square(x).backward()  # noqa: E731
    else:
        peer = work.build(step, "step")
        call = lambda: peer(x, y)  # noqa: E731
    (x.detach() @ x.detach().mT).sum().item()
    found = {"device and inputs": time.perf_counter() - start}
    for name in ("first step", "second step"):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found[name] = time.perf_counter() - start
    return found


def spawn(case: Case, step: str, cache: str) -> dict[str, float]:
    """Run `child` in a new process with its caches in the folder `cache`."""
    environment = os.environ | {
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
    }
    command = [sys.executable, "-m", "bench.first_call", "--child", step, "--case", str(case)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process of the first call failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.first_call", description=__doc__.split("\n")[0])
    options.add_case(parser, DEFAULT)
    parser.add_argument("--compile", action="store_true", help="time the step inside torch.compile")
    parser.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        print(json.dumps(child(chosen.case, chosen.child)))
        return
    for step in STEPS[1:] if chosen.compile else STEPS[:1]:
        with tempfile.TemporaryDirectory() as cache:
            for name in ("cold caches", "warm caches"):
                found = spawn(chosen.case, step, cache)
                seconds = ", ".join(f"{k} {v:.2f} s" for k, v in found.items())
                print(f"{step}, {chosen.case}, {name}: {seconds}", flush=True)


if __name__ == "__main__":
    main()
