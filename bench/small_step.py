"""The library's kernels once on small, uneven shapes, for compute-sanitizer to watch.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.small_step
"""

import torch

from ggam_fast import GGAMHead, GGAMLoss

from . import environment, peers
from .cases import Case

SIZES = ((2, 130, 14, 14), (3, 40, 7, 5), (1, 257, 16, 16))
OPTIONS = (
    {},
    {"pool_type": "max", "spatial_norm": "sum"},
    {"spatial_norm": "sigmoid", "cam_at": "attended"},
    {"pool_type": "flatten"},
    {"attention": "spatial"},
    {"attention": "channel", "pool_type": "max"},
)


def main() -> None:
    device = environment.device()
    torch.manual_seed(0)
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("nchw", "channels_last"):
                for options in OPTIONS:
                    _run(Case(*size, dtype, layout), options, device)
    print("done")


def _run(case: Case, options: dict[str, str], device: torch.device) -> None:
    head = GGAMHead(case.c, 8, hidden_size=16, feat_size=(case.h, case.w), **options).to(device)  # type: ignore[arg-type]
    x = torch.randn(case.n, case.c, case.h, case.w, device=device, dtype=case.dtype)
    if case.layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(8, (case.n,), device=device)
    if case.n == 1:  # batch norm needs two images
        head.eval()
    for loss_of in (peers.guided_loss, lambda h, x, y: GGAMLoss(0.1)(h(x, y), y)):
        x = x.detach().requires_grad_()
        loss_of(head, x, y).backward()
        assert torch.isfinite(x.grad).all(), f"{case} {options}: gradients are not finite"


if __name__ == "__main__":
    main()
