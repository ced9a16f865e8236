"""The classifier's and the channel MLP's layers: products and their weights' gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ggam_fast.backends.registry import get_backend
from ggam_fast.precision import full_precision

from .launch import launch, thread
from .register import operator
from .shapes import FP_FUSION, contiguous, empty, pair, plan, small

from ggam_fast.kernels import layer_grads as layer_grads_kernels  # isort: skip
from ggam_fast.kernels import product as product_kernels  # isort: skip


def _dot_options(x: Tensor) -> dict[str, str | int]:
    if torch.version.hip is not None or x.device.type not in ("cuda", "cpu", "meta"):
        return {"PRECISION": "ieee"}  # AMD's matrix units multiply float32 as it is; others know no maxnreg
    return {"PRECISION": "tf32x3", "maxnreg": 255}  # without a limit Triton 3.9 spills at 168 registers


@operator
def product(
    x: Tensor, x_1: Tensor | None, matrix: Tensor, bias: Tensor | None, mask: Tensor | None, relu: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of one or two x (M, K) and a matrix (K, N): x w + bias, with a ReLU or 0 where mask <= 0"""
    (m, k), (inner, n) = x.shape, matrix.shape
    if k != inner:
        raise RuntimeError(f"a layer takes {inner} features; got {k}, of shape {tuple(x.shape)}")
    if any(t is not None and t.device != x.device for t in (matrix, bias)):
        raise RuntimeError(
            f"a layer's parameters must be on its input's device, {x.device}; got {matrix.device}"
        )
    out = small(m, n, x), small(0 if x_1 is None else m, n, x)
    yield out
    rows = [y.contiguous() for y in (x, x_1) if y is not None]
    count = len(rows)
    # The last of those that share a tile counts on a barrier that waits for the stores of all: not AMD's.
    may_split = torch.version.hip is None and x.device.type in ("cuda", "cpu", "meta")
    # A recording holds launches alone.
    cut = plan.product(count * m, n, k, bias is not None, may_split, thread.recorder is not None)
    if cut is None:
        with full_precision(x):
            for y, found in zip(rows, out, strict=False):
                found.copy_(get_backend("torch").product([y], matrix, bias, mask, relu)[0])
        return
    if (k - 1) * matrix.stride(0) + (n - 1) * matrix.stride(1) >= 2**31:
        matrix = matrix.contiguous()
    tiles = count * plan.blocks(m, cut.block_m) * plan.blocks(n, cut.block_n)
    partials = counters = None
    if cut.split > 1:
        partials = empty((count, cut.split, m, n), x)
        counters = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    if tiles:
        launch(
            product_kernels.product_kernel, tiles * cut.split,
            *pair(rows), matrix, contiguous(bias), contiguous(mask), *pair(out[:count]),
            partials, counters, m, n, k, *rows[0].stride(), *matrix.stride(), R=count, RELU=relu,
            SPLIT=cut.split, STEPS=plan.blocks(plan.blocks(k, cut.split), cut.block_k),
            BLOCK_M=cut.block_m, BLOCK_N=cut.block_n, BLOCK_K=cut.block_k,
            STAGES=cut.stages, num_warps=cut.num_warps, **_dot_options(x), **FP_FUSION,
        )  # fmt: skip


@operator
def layer_grads(
    dy: Tensor,
    x: Tensor,
    dy_1: Tensor | None,
    x_1: Tensor | None,
    dy_2: Tensor | None,
    x_2: Tensor | None,
    dy_3: Tensor | None,
    x_3: Tensor | None,
    vector: Tensor | None,
    vector_1: Tensor | None,
    scale: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """scale dy^T x and scale times the sum of dy over the batch, of up to four layers, and scale times one or
    two vectors; empty without"""
    given = [(dy, x), (dy_1, x_1), (dy_2, x_2), (dy_3, x_3)]
    batch = dy.shape[0]
    out: list[Tensor] = []
    for left, right in given:
        j, c = (0, 0) if left is None or right is None else (left.shape[1], right.shape[1])
        if left is not None and right is not None and not left.shape[0] == right.shape[0] == batch:
            shapes = [tuple(t.shape) for t in (left, right, dy)]
            raise RuntimeError(f"the layers' gradients and inputs must have one batch size; got {shapes}")
        out += [small(j, c, dy), empty((j,), dy)]
    vectors = [vector, vector_1]
    out += [empty((0,) if v is None else v.shape, dy) for v in vectors]
    yield tuple(out)  # type: ignore[misc]
    cut, tiles, scale = plan.LAYER_GRADS, 0, contiguous(scale)
    pointers: list[Tensor | None] = []
    sizes: list[int] = []
    for i, (left, right) in enumerate(given):
        if left is None or right is None:
            continue
        weight, bias = out[2 * i : 2 * i + 2]
        j, c = weight.shape
        # A layer of no inputs has no tile, but a bias.
        if (j * c * batch > plan.LARGEST_PRODUCT and thread.recorder is None) or c == 0:
            with full_precision(right):
                ((found, sums),) = get_backend("torch").layer_grads([(left, right)], scale)
            weight.copy_(found)
            bias.copy_(sums)
            continue
        tiles += plan.blocks(j, cut.block_m) * plan.blocks(c, cut.block_n)
        pointers += [left.contiguous(), right.contiguous(), weight, bias]
        sizes += [j, c]
    more: list[Tensor | None] = []
    for v, copied in zip(vectors, out[8:], strict=True):
        more += [None, None] if v is None else [v.contiguous(), copied]
    lengths = [0 if v is None else v.numel() for v in vectors]
    programs = tiles + sum(plan.blocks(v, cut.block_m * cut.block_n) for v in lengths)
    if not tiles:
        for v, copied in zip(vectors, out[8:], strict=True):
            if v is not None:
                copied.copy_(v if scale is None else v * scale)
    if tiles:
        pointers += [None] * (16 - len(pointers))
        sizes += [0] * (8 - len(sizes))
        launch(
            layer_grads_kernels.layer_grads_kernel, programs, *pointers, scale, batch, *sizes, *more,
            *lengths, STEPS=plan.power_of_2(plan.blocks(batch, cut.block_k)), WIDE_J=all(j % 4 == 0 for j in
            sizes[::2]), WIDE_C=all(c % 4 == 0 for c in sizes[1::2]), BLOCK_J=cut.block_m,
            BLOCK_C=cut.block_n, BLOCK_N=cut.block_k, STAGES=cut.stages, num_warps=cut.num_warps,
            **_dot_options(dy), **FP_FUSION,
        )  # fmt: skip
