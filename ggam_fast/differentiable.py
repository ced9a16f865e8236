"""The stages with derivatives of every order: the two contractions as autograd nodes, the rest in torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .autograd import channel_sum, spatial_sum
from .backends.registry import register_differentiable
from .backends.torch import Backend, PositionGuidance, PositionPull, PositionTerms


class DifferentiableBackend(Backend):
    """The stages of the torch backend, with contractions that run on the backend `name`."""

    def __init__(self, name: str):
        self.name = name

    def channel_sum(self, features: Tensor, weights: Tensor) -> Tensor:
        if self._traced:
            return super().channel_sum(features, weights)
        return channel_sum(features, weights, self.name)

    @property
    def _traced(self) -> bool:
        """Whether Dynamo traces: it silently makes a Function's second derivative zero (torch 2.15)."""
        return self.name == "torch" and torch.compiler.is_compiling()

    def spatial_sum(self, features: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if weights is None or self._traced:  # torch's own sum of A has all its derivatives
            return super().spatial_sum(features, weights, scale)
        return spatial_sum(features, weights, self.name) * scale

    def attention_backward(
        self,
        features: Tensor,
        grads: Sequence[Tensor],
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
        pull: PositionPull | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        (v,) = grads
        du = self.spatial_attention_grad(features, v, scale, extra, t, total, norm, pull)
        return [(du, self.spatial_sum(features, du))]

    def guided_attention_backward(
        self,
        features: Tensor,
        grads: Sequence[Tensor],
        scale: float,
        t: Tensor,
        total: Tensor,
        norm: str,
        terms: PositionTerms,
        weight: float,
    ) -> tuple[list[tuple[Tensor, Tensor]], PositionGuidance]:
        (v,) = grads
        du, found = self.guided_spatial_attention_grad(features, v, scale, t, total, norm, terms)
        return [(du, self.spatial_sum(features, du))], found


for _name in ("torch", "triton"):
    register_differentiable(_name, DifferentiableBackend(_name))
