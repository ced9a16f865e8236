"""Launches every kernel in all its variants, on small and uneven maps, for compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 9 python -m bench.every_kernel

`codegen` records the same launches.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.measure import environment
from ggam_fast.backends.torch import CamTerms, PositionPull, PositionTerms
from ggam_fast.backends.triton import TRITON, cross_entropy, pooling
from ggam_fast.backends.triton.launch import launch, thread
from ggam_fast.layer import BATCH_NORM, ELU, RELU, Layer

MAPS = ((5, 130, 196), (7, 40, 35), (3, 257, 256))
CLASSES = (200, 5000)  # with 200, a program holds all classes of an image; with 5000, it loops over them
ODD_WIDTH = 101  # channels of a batch norm


class _Clearing:
    """A recorder that launches at once.  Like the recorder of a step, it has counters to clear."""

    def __init__(self, counters: Tensor) -> None:
        self.counters = counters

    def clearing(self) -> tuple[Tensor, int]:
        return self.counters, self.counters.numel()

    def launch(
        self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        thread.recorder = None
        launch(kernel, programs, *arguments, **constants)
        thread.recorder = self


def launch_all(a: Tensor, random: bool = False) -> None:
    """Launch all kernels for features (N, C, L).  By default, other inputs are unset memory."""
    (n, c, l), stages = a.shape, TRITON
    new = torch.rand if random else torch.empty
    t, s, total = (new(size, device=a.device) for size in ((n, l), (n, c), (n,)))
    index = torch.zeros(n, c, dtype=torch.int64, device=a.device)
    for weights in (t, None):
        stages.spatial_sum(a, weights, 0.5)
        stages.max_pool(a, weights)
        stages.grad_cam_means(a, a, weights)
        stages.hadamard(a, weights, s, weights is None)
        pooling.attended_map(a, weights, s, 0.5, weights is not None)
    thread.recorder = _Clearing(torch.zeros(300, dtype=torch.int32, device=a.device))
    try:
        stages.spatial_sum(a)
    finally:
        thread.recorder = None
    stages.channel_sum(a, s)
    for norm in ("softmax", "sum", "sigmoid"):
        for kappa in (1, l):
            stages.spatial_attention(a, s, norm, kappa)
            for pool_type in ("avg", "max", ""):
                stages.attended(a, s, norm, pool_type, kappa)
        stages.attention_backward(a, [s, s], 1.0, None, t, total, norm)
        for extra in (t, None):
            stages.spatial_attention_grad(a, s, 1.0, extra, t, total, norm)
            stages.attention_backward(a, [s], 1.0, extra, t, total, norm)
    launch_positions(a, s, t, total)
    stages.position_scatter(s, index, l)
    stages.multiply(s, s, c)
    for pool_type, first in (("avg", s), ("max", s), ("", a)):
        for grad_mean, scale in itertools.product((s, None), (total[0], None)):
            stages.features_grad(a, pool_type, first, index, t, t, s, grad_mean, scale)
            stages.features_grad(a, pool_type, first, index, None, None, s, grad_mean, scale)
    launch_products(s, new)
    for width in (c, ODD_WIDTH):
        launch_batch_norms(new(n, width, device=a.device), new)
    for classes in CLASSES:
        launch_cross_entropies(new(n, classes, device=a.device))
    launch_channels(s, t, total)


def launch_positions(a: Tensor, s: Tensor, t: Tensor, total: Tensor) -> None:
    """Launch the guidance of positions."""
    stages, rest = TRITON, (t, total, "softmax")
    stages.spatial_attention(a, s, "softmax", a.shape[2], True)
    for norm, share in (("relu", total), ("standardized_softmax", total), ("relu", None)):
        terms = PositionTerms(norm, 1.0, t, share)
        for grads in ([s], [s, s]):
            stages.guided_attention_backward(a, grads, 1.0, *rest, terms, 1.0)
        stages.guided_spatial_attention_grad(a, s, 1.0, *rest, terms)
        stages.position_guidance(t, terms)
    for share, scale in ((total, total[0]), (total, None), (None, None)):
        pull = PositionPull(t, share, 1.0, scale)
        stages.attention_backward(a, [s], 1.0, None, *rest, pull)
        stages.spatial_attention_grad(a, s, 1.0, None, *rest, pull)


def launch_channels(s: Tensor, t: Tensor, total: Tensor) -> None:
    """Launch the softmax over channels and the guidance loss."""
    l, stages, whole = t.shape[1], TRITON, CamTerms(s, t, t, s)
    stages.softmax(s)
    stages.softmax_grad(s, s)
    for scale in (total[0], None):
        stages.softmax_grad(s, s, s, scale)
    for cam_norm, divergence in itertools.product(
        ("sigmoid", "softmax", "standardized", "standardized_softmax"), ("symmetric", "forward", "reverse")
    ):
        norm = (cam_norm, 1.0, divergence)
        for terms in (whole, CamTerms(s)):
            stages.guidance(s, terms, None, l, *norm, 1.0)
        # The fused loss passes cross entropies, and the drop-in form passes no dS.
        for ds, losses in ((s, total), (None, None)):
            stages.guided_loss(s, whole, ds, l, *norm, 1.0, True, total, losses)
    for ds, losses in ((s, total), (None, None)):
        stages.guided_loss(s, whole, ds, l, *norm, 1.0, False, total, losses)
    stages.guided_loss(s, CamTerms(s), None, l, *norm, 1.0, True, total, total)
    for losses in (total, None):
        stages.guided_loss(s, whole, None, l, *norm, 1.0, True, total, losses, total, 1.0)


def launch_batch_norms(x: Tensor, new: Callable[..., Tensor]) -> None:
    """Launch batch norm of rows (N, C) and its backward, with gradients of its and a layer's parameters."""
    (n, c), stages = x.shape, TRITON
    gamma, beta, mean, variance = (new(c, device=x.device) for _ in range(4))
    tracked = torch.zeros((), dtype=torch.int64, device=x.device)
    running = Layer(BATCH_NORM, gamma, beta, mean, variance, tracked, eps=1e-5, momentum=0.1)
    fixed = running._replace(training=True)
    settling, cumulative = fixed._replace(settling=True), fixed._replace(momentum=None)
    untracked = fixed._replace(running_mean=None, running_var=None, tracked=None)
    relu, elu = Layer(RELU), Layer(ELU)
    for layer, follows in (
        (fixed, relu), (settling, None), (settling, elu), (cumulative, elu), (untracked, None),
        (running, None), (running, relu), (running, elu),
    ):  # fmt: skip
        stages.batch_norm(x, layer, follows)
    for rows in ([x], [x, x]):
        for layer, follows in ((fixed, None), (fixed, relu), (fixed, elu), (running, elu)):
            stages.batch_norm_grad(rows, x, layer, follows, (mean, variance))
    w, neighbours = new(n, 64, device=x.device), [*new(2, c, device=x.device)]
    for vectors in (neighbours, neighbours * 2):
        stages.parameter_grads([(w, w)] * 4, vectors, gamma[0])


def launch_cross_entropies(logits: Tensor) -> None:
    """Launch cross entropy of labels and of probabilities (N, K), the class scores and the whole loss."""
    stages, scale = TRITON, logits[0, 0]
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    for target, cam_class, ignore_index in (
        (labels, "label", None), (labels, "predicted", -100),
        (logits, "label", None), (logits, "predicted", None),
    ):  # fmt: skip
        stages.cross_entropy(logits, target, 0.1, cam_class, ignore_index)
        stages.class_scores(logits, target, cam_class, ignore_index)
    for target, guidance, ignore in ((labels, scale, None), (labels, None, -100), (logits, scale, None)):
        cross_entropy.whole_loss(logits, target, guidance, 0.1, 1.0, ignore)
    for with_guidance in (True, False):
        cross_entropy.whole_loss_grad(scale, logits, 1.0, with_guidance)


def launch_products(s: Tensor, new: Callable[..., Tensor]) -> None:
    """Launch products of the channel MLP and a classifier, with few rows and with enough for large tiles."""
    (n, c), stages = s.shape, TRITON
    for rows, k in ((n, c), (512, 64)):
        x = s if rows == n else new(rows, k, device=s.device)
        odd = new(rows, 5, device=s.device)  # five classes
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
    # Wide tiles: one part with accesses of 16 bytes, one with accesses of 4 bytes, and several parts.
    for j, k in ((512, 200), (513, 202), (520, 2048)):
        x, w, b = new(n, k, device=s.device), new(j, k, device=s.device), new(j, device=s.device)
        (y,) = stages.product([x], w.t(), b, relu=True)
        stages.product([x], w.t(), b)
        stages.product([x, x], w.t().contiguous(), mask=y)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.every_kernel", description=__doc__.split("\n\n")[0]
    )
    parser.parse_args()
    for n, c, l in MAPS:
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.rand(n, c, l, device=environment.device()).to(dtype)
            launch_all(a, random=True)
            launch_all(a.transpose(1, 2).contiguous().transpose(1, 2), random=True)
    print("done")


if __name__ == "__main__":
    main()
