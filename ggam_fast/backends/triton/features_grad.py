"""dA, written from its small factors."""

from collections.abc import Iterator

from torch import Tensor

from .launch import launch
from .register import operator
from .shapes import FP_FUSION, POOL, contiguous, geometry, like_layout, plan, tile

from ggam_fast.kernels import features_grad as features_grad_kernels  # isort: skip


@operator
def features_grad(
    features: Tensor,
    pool: int,
    first: Tensor,
    index: Tensor,
    t: Tensor | None,
    du: Tensor | None,
    s: Tensor,
    grad_mean: Tensor | None,
    scale: Tensor | None,
) -> Iterator[Tensor]:
    """dA in the layout and type of A, which is not read; see `Backend.features_grad`"""
    out = like_layout(features, features.dtype)
    yield out
    batch, channels, positions = out.shape
    cut = tile(out, num_warps=1)
    sizes = geometry(out, cut)
    dense = pool == POOL["flatten"]
    if t is None or du is None:
        t = du = None
    if batch:
        programs = batch * plan.blocks(channels, cut.block_c) * plan.blocks(positions, cut.block_l)
        launch(
            features_grad_kernels.features_grad_kernel, programs,
            out, first if dense else None, None if dense else first.contiguous(),
            index.contiguous() if pool == POOL["max"] else None, contiguous(t), contiguous(du),
            s.contiguous(), contiguous(grad_mean), scale, out.stride(0),
            first.stride(0) if dense else 0, C=sizes["C"], L=sizes["L"],
            OUT_STRIDE_C=sizes["STRIDE_C"], OUT_STRIDE_L=sizes["STRIDE_L"],
            GRAD_STRIDE_C=first.stride(1) if dense else 0,
            GRAD_STRIDE_L=first.stride(2) if dense else 0,
            POOL=pool, BLOCK_C=cut.block_c, BLOCK_L=cut.block_l, num_warps=cut.num_warps,
            **FP_FUSION,
        )  # fmt: skip
