"""A channel MLP whose layers are called, because they are more than a weight and a bias.

LoRA wrappers, quantized layers, layers with hooks (pruning, weight norm) or with a forward of their own: the
closed form cannot read what they do.  Here e = fc2(relu(fc1(g))) is called once, and autograd gives d/dg of
these two small layers.  The feature map still goes through the two contractions alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends.registry import full_precision
from .backends.torch import PositionGuidance, PositionTerms, cam_weights
from .classifier.layers import packed
from .classifier.rules import Scores
from .classifier.scores import custom_scores
from .closed_form import (
    Attended,
    ChannelMLP,
    Factors,
    Options,
    attend,
    cam_terms,
    cam_terms_of,
    pull_back_to_channels,
)
from .differentiable import DifferentiableBackend


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output; a quantized layer without a derivative gets that of its dequantized weight."""
    y = layer(x)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return y
    weight = getattr(layer, "weight", None)
    weight = weight() if callable(weight) else weight  # torch.ao's layers give it by a call
    if not isinstance(weight, Tensor) or not (weight.is_quantized or packed(layer)):
        return y
    if not weight.is_quantized and _derivative(y, x):
        return y
    straight = F.linear(x, weight.dequantize().to(x.dtype).detach())
    return y.detach() + (straight - straight.detach())


def _derivative(y: Tensor, x: Tensor) -> bool:
    """Whether y has a derivative with respect to x."""
    if not y.requires_grad:
        return False
    try:
        (dx,) = torch.autograd.grad(y, x, torch.zeros_like(y), retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "not implemented" in str(error):
            return False
        raise
    return dx is not None


class CalledMLP(NamedTuple):
    """F_cr as two modules."""

    fc1: nn.Module
    fc2: nn.Module

    def logits(self, mean: Tensor) -> Tensor:
        """e (N, C) of g (N, C), each layer in the type of its parameters."""
        hidden = torch.relu(_in_its_type(self.fc1, mean))
        logits = _in_its_type(self.fc2, hidden.to(mean.dtype)).to(mean.dtype)
        if logits.shape != mean.shape:
            raise ValueError(f"fc2 must give (N, {mean.shape[1]}); got shape {tuple(logits.shape)}")
        return logits


def _in_its_type(layer: nn.Module, x: Tensor) -> Tensor:
    parameter = next((p for p in layer.parameters() if p.is_floating_point()), None)
    return call(layer, x if parameter is None else x.to(parameter.dtype))


class CalledBackend(DifferentiableBackend):
    """The differentiable stages for one call of a head whose channel MLP is called."""

    def __init__(self, name: str, mlp: CalledMLP, guided: bool, detach: bool):
        super().__init__(name)
        self.mlp, self.guided, self.detach = mlp, guided, detach
        self.scores: Scores | None = None

    def channel_mlp(self, mean: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.guided:
            return mean.new_empty(0), self.mlp.logits(mean)
        self.scores = custom_scores(self.mlp.logits, mean, self.detach, "fc1 or fc2")
        return mean.new_empty(0), self.scores.logits

    def attention(self, features: Tensor, options: Options) -> Attended:
        """`attend`, with gradients if they are enabled."""
        with full_precision(features):
            return attend(self, features, _NO_WEIGHTS, options)

    def grad_cam_weights(
        self,
        features: Tensor,
        options: Options,
        attended: Attended,
        grad_pooled: Tensor,
        cam_at: str,
        terms: PositionTerms | None = None,
    ) -> tuple[Tensor, PositionGuidance | None]:
        """beta (N, C), given v = `grad_pooled`; with derivatives unless it is detached.

        With `terms` also the guidance of T.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach), full_precision(features):
            if cam_at == "features":
                (pulled,) = pull_back_to_channels(
                    self, features, options, attended, [grad_pooled], terms=terms
                )
                assert self.scores is not None
                assert pulled.grad_channel is not None
                de = self.softmax_grad(pulled.grad_channel, pulled.softmax)
                (dg,), _ = self.scores.pull_back([de])
                first_mean, first, s, channel, du, _, guided = pulled
                of_beta = cam_terms(Factors(first_mean, first, channel, du, dg, de, None), attended)
            else:
                of_beta, s, guided = cam_terms_of(  # type: ignore[assignment]
                    self, features, _NO_WEIGHTS, options, attended, grad_pooled, cam_at, terms
                )
            beta = cam_weights(of_beta, s, features.shape[2])
            return beta.detach() if self.detach else beta, guided


_NO_WEIGHTS = ChannelMLP(None, None, None, None)
