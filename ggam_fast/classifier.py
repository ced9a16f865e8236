"""The classifier and v = d y / d pooled, the gradient of its class scores.

For the default classifiers, a chain of Linear, BatchNorm1d, ELU, ReLU, Dropout and Identity, v is
written out layer by layer, each by torch's own backward operation: tensor code that `torch.compile`
traces and autograd can go through again. The parameters' gradients come on the way, as factors
(`LayerGradient`).
For any other module v comes from `torch.autograd.grad`, which a compiled step can only trace with
`torch._dynamo.config.trace_autograd_ops = True`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import Function
from .checks import as_type
from .stages import Stages

aten = torch.ops.aten


class LayerGradient(NamedTuple):
    """The gradients of a layer's weight and bias: for dy (N, J) and x (N, C) dy^T x and the sum of dy over
    the batch, which the caller has yet to take; or, of a batch norm, the two themselves."""

    weight: Tensor | None
    bias: Tensor | None
    left: Tensor  # dy | d weight
    right: Tensor  # x | d bias
    product: bool


Pullback = Callable[[Sequence[Tensor]], tuple[Sequence[Tensor], list[LayerGradient]]]
"""From gradients of the output to those of the input; with gradients disabled also to the parameters', for
the last of them."""


class Scores(NamedTuple):
    """Logits, and the map from gradients d y / d logits (N, K) to v = d y / d pooled."""

    logits: Tensor
    pull_back: Pullback


def probabilities(logits: Tensor, target: Tensor) -> Tensor:
    """The target as class probabilities (N, K): one-hot for class indices."""
    if target.is_floating_point():
        return target.to(logits.dtype)
    return torch.zeros_like(logits, requires_grad=False).scatter(1, target.unsqueeze(1), 1.0)


def score_gradient(logits: Tensor, target: Tensor, cam_class: str) -> Tensor:
    """d y / d logits (N, K): one-hot of the label or of the predicted class, or the soft target."""
    return probabilities(logits, logits.detach().argmax(-1) if cam_class == "predicted" else target)


def layers_of(classifier: nn.Module) -> list[nn.Module]:
    """The layers of an nn.Sequential, else the classifier as one layer."""
    # A subclass without a forward of its own, such as FSDP makes, runs its layers too.
    own_forward = type(classifier).forward is not nn.Sequential.forward
    if isinstance(classifier, nn.Sequential) and not own_forward and len(classifier) > 0:
        return list(classifier)  # with all occurrences of a layer
    return [classifier]


def closed_form_layers(classifier: nn.Module, drop: nn.Dropout) -> list[nn.Module] | None:
    """The layers in order, dropout before the last one; None if any has no closed form here."""
    *body, last = layers_of(classifier)
    layers = [*body, drop, last]
    known = all(type(m) in _RULES and not hooked(m) for m in layers)
    return layers if known and not hooked(classifier) else None


def hooked(module: nn.Module) -> bool:
    """Whether the module must be called as a module, for its hooks or a forward of its own to run."""
    hooks = (module._forward_hooks, module._forward_pre_hooks,
             module._backward_hooks, module._backward_pre_hooks)  # fmt: skip
    return any(hooks) or "forward" in vars(module)


def run(layers: list[nn.Module], x: Tensor, stages: Stages) -> Tensor:
    """The layers' output, in the type of x whatever the parameters' type."""
    for layer in layers:
        x, _ = _RULES[type(layer)](layer, x, stages)
    return x


def scores(layers: list[nn.Module], x: Tensor, detach: bool, stages: Stages) -> Scores:
    """Run each layer once (batch statistics move once, one dropout mask) and remember its pullback."""
    pullbacks: list[Pullback] = []
    for layer in layers:
        x, pull = _RULES[type(layer)](layer, x, stages)
        pullbacks.append(pull)

    def pull_back(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        gradients: list[LayerGradient] = []
        for pull in reversed(pullbacks):
            rows, found = pull(rows)
            gradients += found
        return rows, gradients

    def detached(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        with torch.no_grad():
            return pull_back(rows)

    return Scores(x, detached if detach else pull_back)


_IN_PLACE = (
    "classifier must not change its input in place, where Grad-CAM takes the gradient; "
    "give its first layer inplace=False"
)


def custom_scores(classifier: Callable[[Tensor], Tensor], x: Tensor, detach: bool) -> Scores:
    """`scores_by_autograd`, for which torch.compile breaks its graph unless it is told to trace autograd."""
    if torch.compiler.is_dynamo_compiling() and not torch._dynamo.config.trace_autograd_ops:
        reason = "a custom classifier's Grad-CAM compiles with torch._dynamo.config.trace_autograd_ops = True"
        return torch._dynamo.disable(scores_by_autograd, reason=reason)(classifier, x, detach)
    return scores_by_autograd(classifier, x, detach)


def scores_by_autograd(classifier: Callable[[Tensor], Tensor], x: Tensor, detach: bool) -> Scores:
    """The same for any module: its forward runs once, v is autograd's, and so are the parameters' gradients,
    which are not given here.

    Raises ValueError if the module changes its input in place, where v would be another gradient; a
    compiled step cannot look and does not.
    """
    # Dynamo says the same of every compilation (torch 2.11).
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "torch.export cannot trace a custom classifier's class-score gradient, which is autograd's: "
            "export the head without target, or with Linear, BatchNorm1d, ELU, ReLU and Dropout layers alone"
        )
    needs_graph = torch.is_grad_enabled()
    eager = not torch.compiler.is_compiling()
    inference = eager and torch.is_inference_mode_enabled()

    def graph_allowed() -> AbstractContextManager[object]:
        return torch.inference_mode(False) if inference else nullcontext()

    with graph_allowed(), torch.enable_grad():
        x = x.clone() if inference else x
        if not (needs_graph and x.requires_grad):
            x = x.detach().requires_grad_()
        version = x._version if eager else 0
        try:
            logits = classifier(x)
        except RuntimeError as error:
            if x.is_leaf and "leaf Variable that requires grad" in str(error):
                raise ValueError(_IN_PLACE) from error
            raise
        if eager and x._version != version:
            raise ValueError(_IN_PLACE)

    def pull_one(seed: Tensor) -> Tensor:
        # The module may work in float16, where the cross entropy's small gradients would vanish.
        scale = power_of_two(seed.detach())
        with graph_allowed(), torch.enable_grad():
            (v,) = torch.autograd.grad(
                logits,
                x,
                (seed / scale).to(logits.dtype),
                retain_graph=needs_graph,
                create_graph=needs_graph and not detach,
            )
        return scale * (v.detach() if detach else v)

    def pull_back(seeds: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        return [pull_one(seed) for seed in seeds], []

    return Scores(logits if needs_graph else logits.detach(), pull_back)


def power_of_two(x: Tensor) -> Tensor:
    """The power of two below the largest |x|, (): dividing by it is exact.  1 for zeros and non-finite x."""
    largest = x.abs().amax() if x.numel() else x.new_ones(())
    exact = torch.exp2(torch.floor(torch.log2(largest)))
    return torch.where((largest > 0) & largest.isfinite(), exact, torch.ones_like(largest))


class Anchored(Function):
    """x as a function of `anchor`, which gets no gradient from it.

    A compiled step cannot return what depends on a leaf made inside it, as `scores_by_autograd` makes one
    of an x without a graph.
    """

    @staticmethod
    def forward(x: Tensor, anchor: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def _linear(layer: nn.Linear, x: Tensor, stages: Stages) -> tuple[Tensor, Pullback]:
    own_weight, own_bias = layer.weight, layer.bias
    weight = as_type(own_weight, x.dtype)
    bias = None if own_bias is None else as_type(own_bias, x.dtype)

    def pull(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        held = LayerGradient(own_weight, own_bias, rows[-1], x, True)
        differentiable = Stages() if torch.is_grad_enabled() else stages
        return differentiable.product(rows, weight), [held]

    return stages.linear(x, weight, bias), pull


def _identity(layer: nn.Module, x: Tensor, stages: Stages) -> tuple[Tensor, Pullback]:
    return x, lambda rows: (rows, [])


def _dropout(layer: nn.Dropout, x: Tensor, stages: Stages) -> tuple[Tensor, Pullback]:
    if not layer.training or layer.p == 0.0:
        return _identity(layer, x, stages)
    mask = F.dropout(torch.ones_like(x), layer.p)
    return x * mask, lambda rows: ([v * mask for v in rows], [])


def _relu(layer: nn.ReLU, x: Tensor, stages: Stages) -> tuple[Tensor, Pullback]:
    return torch.relu(x), lambda rows: ([aten.threshold_backward(v, x, 0) for v in rows], [])


def _elu(layer: nn.ELU, x: Tensor, stages: Stages) -> tuple[Tensor, Pullback]:
    def pull(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        if torch.is_grad_enabled():  # as for batch norm
            slope = (layer.alpha * x.clamp(max=0).exp()).masked_fill(x > 0, 1.0)
            return [v * slope for v in rows], []
        return [aten.elu_backward(v, layer.alpha, 1, 1, False, x) for v in rows], []

    return F.elu(x, layer.alpha), pull


def _batch_norm(layer: nn.BatchNorm1d, x: Tensor, stages: Stages) -> tuple[Tensor, Pullback]:
    dtype = x.dtype
    own_weight, own_bias = layer.weight, layer.bias
    gamma = None if own_weight is None else as_type(own_weight, dtype)
    beta = None if own_bias is None else as_type(own_bias, dtype)
    if x.shape[0] == 0:
        # No statistics to take or to move; the parameters stay in the graph.
        scale = torch.ones_like(x[:1]) if gamma is None else gamma

        def pull_nothing(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
            v = rows[-1]
            held = LayerGradient(own_weight, own_bias, (v * x).sum(0), v.sum(0), False)
            return [v * scale for v in rows], [held]

        return x * scale + (0.0 if beta is None else beta), pull_nothing
    from_batch = layer.training or layer.running_mean is None
    y, saved = _normalise(layer, x, gamma, beta, from_batch)

    def statistics() -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance that x was normalised with, and one over the deviation; of the batch's, torch's
        backward looks at no variance (but on CUDA asks for one)."""
        if saved is not None:
            mean, scale = saved
            return mean, mean, scale
        if from_batch:
            variance, mean = torch.var_mean(x, 0, correction=0)
        else:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean, variance = layer.running_mean.to(dtype), layer.running_var.to(dtype)
        return mean, variance, torch.rsqrt(variance + layer.eps)

    def pull(rows: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        mean, variance, scale = statistics()
        if torch.is_grad_enabled():  # torch's own has no third derivative
            rows = rows if gamma is None else [v * gamma for v in rows]
            if not from_batch:
                return [v * scale for v in rows], []
            normed = (x - mean) * scale
            return [scale * (v - v.mean(0) - normed * (v * normed).mean(0)) for v in rows], []
        affine = gamma is not None or beta is not None
        # Without a weight CUDA gives no bias gradient either.
        weight = torch.ones_like(mean) if affine and gamma is None else gamma
        pulled = [
            aten.native_batch_norm_backward(
                row, x, weight, mean, variance, mean, scale, from_batch, layer.eps, [True, affine, affine]
            )
            for row in rows
        ]
        _, dgamma, dbeta = pulled[-1]
        held = LayerGradient(own_weight, own_bias, dgamma, dbeta, False)
        return [dx for dx, _, _ in pulled], [held] if affine else []

    return y, pull


def _normalise(
    layer: nn.BatchNorm1d, x: Tensor, gamma: Tensor | None, beta: Tensor | None, from_batch: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The layer's output and, where they are at hand, the batch's mean and one over its deviation."""
    # The operator behind F.batch_norm gives the statistics too; of one image F.batch_norm says what is wrong.
    give = from_batch and not torch.is_grad_enabled() and x.shape[0] > 1
    own_mean, own_var = layer.running_mean, layer.running_var
    untracked = layer.training and not layer.track_running_stats
    if own_mean is None or own_var is None or untracked:
        if give:
            y, *saved = aten._native_batch_norm_legit.no_stats(x, gamma, beta, True, 0.0, layer.eps)
            return y, (saved[0], saved[1])
        return F.batch_norm(x, None, None, gamma, beta, True, 0.0, layer.eps), None
    momentum = layer.momentum
    if layer.training and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if momentum is None:  # the cumulative average of torch's BatchNorm
            momentum = 1.0 / float(layer.num_batches_tracked)
    mean, var = as_type(own_mean, x.dtype), as_type(own_var, x.dtype)
    if give:
        y, *saved = aten._native_batch_norm_legit(x, gamma, beta, mean, var, True, momentum or 0.0, layer.eps)
        found = (saved[0], saved[1])
    else:
        y = F.batch_norm(x, mean, var, gamma, beta, from_batch, momentum or 0.0, layer.eps)
        found = None
    if layer.training and mean is not own_mean:  # statistics of another type: move the copy
        own_mean.copy_(mean)
        own_var.copy_(var)
    return y, found


_RULES: dict[type, Callable[..., tuple[Tensor, Pullback]]] = {
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.ELU: _elu,
    nn.ReLU: _relu,
    nn.Dropout: _dropout,
    nn.Identity: _identity,
}
