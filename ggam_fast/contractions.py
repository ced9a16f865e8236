"""The two contractions everything GGAM does to A goes through, differentiable to any order.

    channel_sum(A, s)[l] = sum_c s_c A_cl        d/dA = s (x) u    d/ds = spatial_sum(A, u)
    spatial_sum(A, t)[c] = sum_l t_l A_cl        d/dA = w (x) t    d/dt = channel_sum(A, w)

Each backward is made of the other contraction and an outer product, so derivatives of derivatives
stay inside the set, and no kernel needs a second-order version of itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autograd import Function
from .checks import full_precision
from .stages import Stages


class ChannelSum(Function):
    """channel_sum(A (N, C, L), s (N, C)) -> (N, L)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, weights: Tensor, backend: str) -> Tensor:
        return get_stages(backend).channel_sum(features, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.backend = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (u,) = grads
        features, s = ctx.saved_tensors
        da = ds = None
        with full_precision(features):
            if ctx.needs_input_grad[0]:
                da = (s.unsqueeze(-1) * u.unsqueeze(-2)).to(features.dtype)
            if ctx.needs_input_grad[1]:
                ds = SpatialSum.apply(features, u, ctx.backend)
        return da, ds, None


class SpatialSum(Function):
    """spatial_sum(A (N, C, L), t (N, L)) -> (N, C)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, weights: Tensor, backend: str) -> Tensor:
        return get_stages(backend).spatial_sum(features, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.backend = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (w,) = grads
        features, t = ctx.saved_tensors
        da = dt = None
        with full_precision(features):
            if ctx.needs_input_grad[0]:
                da = (w.unsqueeze(-1) * t.unsqueeze(-2)).to(features.dtype)
            if ctx.needs_input_grad[1]:
                dt = ChannelSum.apply(features, w, ctx.backend)
        return da, dt, None


class DifferentiableStages(Stages):
    """The stages with a derivative of every order: the contractions above, torch for the rest."""

    def __init__(self, backend: str):
        self.backend = backend

    def channel_sum(self, features: Tensor, weights: Tensor) -> Tensor:
        if self._traced:
            return super().channel_sum(features, weights)
        return ChannelSum.apply(features, weights, self.backend)

    @property
    def _traced(self) -> bool:
        """Dynamo loses the second derivative of an autograd Function (zeros, silently; torch 2.15)."""
        return self.backend == "torch" and torch.compiler.is_compiling()

    def spatial_sum(self, features: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if weights is None or self._traced:  # torch's own sum of A has all its derivatives
            return super().spatial_sum(features, weights, scale)
        return SpatialSum.apply(features, weights, self.backend) * scale

    def attention_backward(
        self,
        features: Tensor,
        grads: Sequence[Tensor],
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
    ) -> list[tuple[Tensor, Tensor]]:
        (v,) = grads
        du = self.spatial_attention_grad(features, v, scale, extra, t, total, norm)
        return [(du, self.spatial_sum(features, du))]


_TORCH = Stages()


def get_stages(backend: str) -> Stages:
    """The stages of a resolved backend, "torch" or "triton", for code autograd does not look into."""
    if backend == "torch":
        return _TORCH
    from .ops import TRITON

    return TRITON
