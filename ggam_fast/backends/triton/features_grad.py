"""dA, written from its small factors."""

import torch
from torch import Tensor

from .launch import FP_FUSION, POOL, contiguous, launch, like_layout, plan, runs
from .register import KernelBackend, operator

from ggam_fast.kernels import features_grad as features_grad_kernels  # isort: skip


class FeaturesGrad(KernelBackend):
    """The stage of this file."""

    def features_grad(
        self,
        features: Tensor,
        pool_type: str,
        first: Tensor,
        index: Tensor,
        t: Tensor | None,
        du: Tensor | None,
        s: Tensor,
        grad_mean: Tensor | None,
        scale: Tensor | None = None,
    ) -> Tensor:
        # In compiled code Inductor fuses torch's outer products into the code that uses dA.
        if torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag and pool_type == "avg":
            return super().features_grad(features, pool_type, first, index, t, du, s, grad_mean, scale)
        return self.run.features_grad(features, POOL[pool_type], first, index, t, du, s, grad_mean, scale)


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
) -> Tensor:
    """dA in the layout and type of A, without reading A; see `Backend.features_grad`."""
    out = like_layout(features, features.dtype)
    batch, channels, positions = out.shape
    if runs(batch):
        cut = plan.tile(channels, positions, plan.memory_order(out.stride()), num_warps=1)
        dense = pool == POOL["flatten"]
        if t is None or du is None:
            t = du = None
        programs = batch * plan.blocks(channels, cut.block_c) * plan.blocks(positions, cut.block_l)
        launch(
            features_grad_kernels.features_grad_kernel, programs,
            out, first if dense else None, None if dense else first.contiguous(),
            index.contiguous() if pool == POOL["max"] else None, contiguous(t), contiguous(du),
            s.contiguous(), contiguous(grad_mean), scale, out.stride(0),
            first.stride(0) if dense else 0, C=channels, L=positions,
            OUT_STRIDE_C=out.stride(1), OUT_STRIDE_L=out.stride(2),
            GRAD_STRIDE_C=first.stride(1) if dense else 0,
            GRAD_STRIDE_L=first.stride(2) if dense else 0,
            POOL=pool, BLOCK_C=cut.block_c, BLOCK_L=cut.block_l, num_warps=cut.num_warps,
            **FP_FUSION,
        )  # fmt: skip
    return out
