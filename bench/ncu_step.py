"""One pass, for ncu to look at: everything before the marked call is left out of the profile.

ncu --profile-from-start off ... python -m bench.ncu_step 128x2048x14x14-bfloat16-nchw step
"""

import argparse

import torch

from .cases import PASSES, Case
from .workload import Workload


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ncu_step", description=__doc__.split("\n")[0])
    parser.add_argument("case", type=Case.parse)
    parser.add_argument("run", choices=PASSES)
    parser.add_argument("--provider", default="fused")
    chosen = parser.parse_args()
    work = Workload(chosen.case, torch.device("cuda"))
    call = work.call(work.build(chosen.provider, chosen.run))
    for i in range(len(work.features)):
        call(i)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call(0)  # its features were used longest ago: not in L2
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
