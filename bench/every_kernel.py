"""Every kernel, in the variants that the head launches: for `codegen` to record, and on small, uneven maps
for compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.every_kernel
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ggam_fast import ops
from ggam_fast.stages import CamTerms

from . import environment

MAPS = ((5, 130, 196), (7, 40, 35), (3, 257, 256))


def launch_all(a: Tensor, random: bool = False) -> None:
    """The operators' launches for features (N, C, L); values are what memory holds unless `random`."""
    (n, c, l), stages = a.shape, ops.TRITON
    new = torch.rand if random else torch.empty
    t, s, total = (new(size, device=a.device) for size in ((n, l), (n, c), (n,)))
    index = torch.zeros(n, c, dtype=torch.int64, device=a.device)
    for weights in (t, None):
        stages.spatial_sum(a, weights, 0.5)
        stages.max_pool(a, weights)
        stages.grad_cam_means(a, a, weights)
        stages.hadamard(a, weights, s, weights is None)
    stages.channel_sum(a, s)
    for norm in ("softmax", "sum", "sigmoid"):
        stages.spatial_attention(a, s, norm)
        for pool_type in ("avg", "max", ""):
            stages.attended(a, s, norm, pool_type)
        stages.attention_backward(a, [s, s], 1.0, None, t, total, norm)
        for extra in (t, None):
            stages.spatial_attention_grad(a, s, 1.0, extra, t, total, norm)
            stages.attention_backward(a, [s], 1.0, extra, t, total, norm)
    stages.position_scatter(s, index, l)
    for pool_type, first in (("avg", s), ("max", s), ("", a)):
        for grad_mean, scale in itertools.product((s, None), (total[0], None)):
            stages.features_grad(a, pool_type, first, index, t, t, s, grad_mean, scale)
            stages.features_grad(a, pool_type, first, index, None, None, s, grad_mean, scale)
    launch_products(s, new)
    for cam_norm, divergence in itertools.product(
        ("sigmoid", "softmax", "standardized"), ("symmetric", "forward")
    ):
        for terms, ds in ((CamTerms(s, t, t, s), s), (CamTerms(s, t, t, s), None), (CamTerms(s), s)):
            stages.guidance(s, terms, ds, l, cam_norm, 1.0, divergence, 1.0, True)


def launch_products(s: Tensor, new: Callable[..., Tensor]) -> None:
    """Of the channel MLP and a classifier, for few rows and for as many as have large tiles."""
    (n, c), stages = s.shape, ops.TRITON
    for rows, k in ((n, c), (512, 64)):
        x = s if rows == n else new(rows, k, device=s.device)
        odd = new(rows, 5, device=s.device)  # as of five classes
        for j in (max(c // 16, 1), 1024):
            w, b = new(j, k, device=s.device), new(j, device=s.device)
            (y,) = stages.product([x], w.t(), b, relu=True)
            stages.product([x], w.t(), b)
            for back in ([y], [y, y]):
                stages.product(back, w)
            stages.product([y], w, mask=x)
            for scale in (b[0], None):
                for count in (1, 2, 4):
                    stages.layer_grads([(y, x), (x, y), (y, y), (x, x)][:count], scale)
                stages.layer_grads([(odd, x), (y, x)], scale)
    # Wide tiles: of one part with accesses of 16 bytes and of 4, and of several parts.
    for j, k in ((512, 200), (513, 202), (520, 2048)):
        x, w, b = new(n, k, device=s.device), new(j, k, device=s.device), new(j, device=s.device)
        (y,) = stages.product([x], w.t(), b, relu=True)
        stages.product([x], w.t(), b)
        stages.product([x, x], w.t().contiguous(), mask=y)


def main() -> None:
    for n, c, l in MAPS:
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.rand(n, c, l, device=environment.device()).to(dtype)
            launch_all(a, random=True)
            launch_all(a.transpose(1, 2).contiguous().transpose(1, 2), random=True)
    print("done")


if __name__ == "__main__":
    main()
