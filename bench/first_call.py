"""How long a user's first step takes: in a new process with empty caches, then in one with warm ones.

    python -m bench.first_call
    python -m bench.first_call --case 32x2048x14x14-bfloat16-nchw --compile

Timed from the call to its end on the device, after imports and after the device's own start.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

from .cases import Case
from .environment import ROOT

DEFAULT = "32x2048x14x14-bfloat16-nchw"
CHILD = "--child"


def child(case: Case, compiled: bool) -> dict[str, float]:
    """Seconds of the start of the device, of the first step, and of the second."""
    start = time.perf_counter()
    import torch

    from . import environment, peers
    from .workload import Workload

    device = environment.device()
    work = Workload(case, device)
    peer = work.build("fused_compiled" if compiled else "fused", "step")
    x, y = work.leaves[0], work.target
    (x.detach() @ x.detach().mT).sum().item()
    found = {"device and inputs": time.perf_counter() - start}
    for name in ("first step", "second step"):
        start = time.perf_counter()
        peer(x, y)
        if device.type == "cuda":
            torch.cuda.synchronize()
        found[name] = time.perf_counter() - start
    assert isinstance(peer, peers.Step)
    return found


def spawn(case: Case, compiled: bool, cache: str) -> dict[str, float]:
    """`child` in a new process with these caches."""
    environment = os.environ | {
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
    }
    command = [sys.executable, "-m", "bench.first_call", CHILD, "--case", str(case)]
    done = subprocess.run(
        command + ["--compile"] * compiled, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the first call failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.first_call", description=__doc__.split("\n")[0])
    parser.add_argument("--case", type=Case.parse, default=Case.parse(DEFAULT))
    parser.add_argument("--compile", action="store_true", help="inside torch.compile")
    parser.add_argument(CHILD, action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        print(json.dumps(child(chosen.case, chosen.compile)))
        return
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold caches", "warm caches"):
            found = spawn(chosen.case, chosen.compile, cache)
            print(
                f"{chosen.case}, {name}:", ", ".join(f"{k} {v:.2f} s" for k, v in found.items()), flush=True
            )


if __name__ == "__main__":
    main()
