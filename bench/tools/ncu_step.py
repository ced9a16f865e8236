"""Runs one pass for ncu, which profiles only the last call.

ncu --profile-from-start off ... python -m bench.ncu_step 128x2048x14x14-bfloat16-nchw step
"""

import argparse

import torch

from bench.suite.cases import PASSES
from bench.suite.workload import Workload
from bench.tools import options


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ncu_step", description=__doc__.split("\n")[0])
    parser.add_argument("case", type=options.case, metavar="CASE", help="such as 32x2048x14x14-bfloat16-nchw")
    parser.add_argument("run", choices=PASSES, help="the pass")
    parser.add_argument(
        "--provider", default="fused", help="the provider, see bench/suite/peers.py (default: fused)"
    )
    chosen = parser.parse_args()
    work = Workload(chosen.case, torch.device("cuda"))
    call = work.call(work.build(chosen.provider, chosen.run))
    for i in range(len(work.features)):
        call(i)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call(0)  # of all buffers this one was used longest ago, so it is not in L2
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
