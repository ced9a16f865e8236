"""The known layers in closed form: scores, v = d y / d pooled, and factors of the parameters' gradients.

Without a graph the layers are one chain, a stage of the backend.  If autograd must differentiate them, each
layer has a rule here, whose backward is written out in torch operations.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ggam_fast.autograd import Linear
from ggam_fast.backends.registry import get_backend, looked_into
from ggam_fast.backends.torch import TORCH, Backend, batch_norm
from ggam_fast.layer import (
    BATCH_NORM,
    DROPOUT,
    ELU,
    IDENTITY,
    LINEAR,
    RELU,
    Layer,
    LayerGradient,
    chain_of,
)
from ggam_fast.precision import as_types

Pullback = Callable[[Sequence[Tensor]], tuple[Sequence[Tensor], list[LayerGradient]]]
"""Maps gradients of the output to gradients of the input.

With autograd disabled it also returns the parameters' gradients, for the last of the given gradients."""


class Scores(NamedTuple):
    """Logits, and the map from gradients d y / d logits (N, K) to v = d y / d pooled."""

    logits: Tensor
    pull_back: Pullback


def run(layers: Sequence[Layer], x: Tensor, backend: str) -> Tensor:
    """The layers' output, in the type of x even if the parameters have another type."""
    return _forward(layers, x, backend)[0]


def scores(layers: Sequence[Layer], x: Tensor, detach: bool, backend: str) -> Scores:
    """Run each layer once (one update of running statistics, one dropout mask) and keep its pullback."""
    y, pull_back = _forward(layers, x, backend)

    def detached(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        with torch.no_grad():
            return pull_back(rows)

    return Scores(y, detached if detach else pull_back)


def _forward(layers: Sequence[Layer], x: Tensor, backend: str) -> tuple[Tensor, Pullback]:
    stages = get_backend(backend)
    if not torch.is_grad_enabled():
        links = chain_of(layers)
        y, given = stages.chain(links, x)
        return y, lambda rows: stages.chain_grad(links, given, rows)
    pullbacks: list[Pullback] = []
    for layer in layers:
        x, pull = _RULES[layer.kind](layer, x, stages, backend)
        pullbacks.append(pull)

    def pull_back(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        gradients: list[LayerGradient] = []
        for pull in reversed(pullbacks):
            rows, found = pull(rows)
            gradients += found
        return rows, gradients

    return x, pull_back


def _linear(layer: Layer, x: Tensor, stages: Backend, backend: str) -> tuple[Tensor, Pullback]:
    assert layer.weight is not None
    weight: Tensor = layer.weight
    bias = layer.bias

    def pull(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        held = LayerGradient(layer.weight, layer.bias, rows[-1], x, True)
        # torch's products have derivatives of every order.
        return (TORCH if torch.is_grad_enabled() else stages).product(rows, weight), [held]

    weight, bias = as_types(x.dtype, weight, bias)
    own = stages.multiplies(x.dtype)
    return Linear.apply(x, weight, bias, backend) if own else F.linear(x, weight, bias), pull


def _identity(layer: Layer, x: Tensor, stages: Backend, backend: str) -> tuple[Tensor, Pullback]:
    return x, lambda rows: (rows, [])


def _dropout(layer: Layer, x: Tensor, stages: Backend, backend: str) -> tuple[Tensor, Pullback]:
    if not layer.training or layer.p == 0.0:
        return _identity(layer, x, stages, backend)
    mask = F.dropout(torch.ones_like(x), layer.p)
    return x * mask, lambda rows: ([v * mask for v in rows], [])


def _relu(layer: Layer, x: Tensor, stages: Backend, backend: str) -> tuple[Tensor, Pullback]:
    return torch.relu(x), lambda rows: ([torch.ops.aten.threshold_backward(v, x, 0) for v in rows], [])


def _elu(layer: Layer, x: Tensor, stages: Backend, backend: str) -> tuple[Tensor, Pullback]:
    def pull(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        if torch.is_grad_enabled():  # torch's ELU has no third derivative
            slope = (layer.alpha * x.clamp(max=0).exp()).masked_fill(x > 0, 1.0)
            return [v * slope for v in rows], []
        return [torch.ops.aten.elu_backward(v, layer.alpha, 1, 1, False, x) for v in rows], []

    return F.elu(x, layer.alpha), pull


def _batch_norm(layer: Layer, x: Tensor, stages: Backend, backend: str) -> tuple[Tensor, Pullback]:
    """In operations that autograd can differentiate any number of times."""
    dtype = x.dtype
    gamma, beta = as_types(dtype, layer.weight, layer.bias)
    if x.shape[0] == 0:
        # An empty batch has no statistics, but its output must depend on the parameters in the graph.
        slope = torch.ones_like(x[:1]) if gamma is None else gamma

        def pull_nothing(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
            v = rows[-1]
            held = LayerGradient(layer.weight, layer.bias, (v * x).sum(0), v.sum(0), False)
            return [v * slope for v in rows], [held]

        return x * slope + (0.0 if beta is None else beta), pull_nothing
    y, constants = batch_norm(layer, x, gamma, beta, give=not looked_into())

    def statistics() -> tuple[Tensor, Tensor]:
        """The mean and 1 / deviation; with derivatives if they are enabled."""
        if constants is not None and not torch.is_grad_enabled():
            return constants
        if layer.from_batch:
            variance, mean = torch.var_mean(x, 0, correction=0)
        else:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean, variance = layer.running_mean.to(dtype), layer.running_var.to(dtype)
        return mean, torch.rsqrt(variance + layer.eps)

    def pull(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        mean, scale = statistics()
        if torch.is_grad_enabled():
            weighted = rows if gamma is None else [v * gamma for v in rows]
            if not layer.from_batch:
                return [v * scale for v in weighted], []
            normed = (x - mean) * scale
            return [scale * (v - v.mean(0) - normed * (v * normed).mean(0)) for v in weighted], []
        found, dgamma, dbeta = TORCH.batch_norm_grad(rows, x, layer, None, (mean, scale))
        if dgamma is None or dbeta is None:
            return found, []
        return found, [LayerGradient(layer.weight, layer.bias, dgamma, dbeta, False)]

    return y, pull


_RULES: dict[str, Callable[[Layer, Tensor, Backend, str], tuple[Tensor, Pullback]]] = {
    LINEAR: _linear,
    BATCH_NORM: _batch_norm,
    ELU: _elu,
    RELU: _relu,
    DROPOUT: _dropout,
    IDENTITY: _identity,
}
