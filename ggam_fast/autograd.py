"""Every autograd Function of the library.

    channel_sum(A, s)[l] = sum_c s_c A_cl        d/dA = s (x) u    d/ds = spatial_sum(A, u)
    spatial_sum(A, t)[c] = sum_l t_l A_cl        d/dA = w (x) t    d/dt = channel_sum(A, w)

Both are linear in each argument, so the forward-mode derivative of each is itself on the tangents.
Everything GGAM does to A goes through these two contractions.  The backward of each one is an outer product
and the other contraction, so no kernel needs a second-order version.  `Attention` and `HeldGradient` are the
closed form as one node.  Second derivatives of `Attention` go through the contractions.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

from .backends.registry import full_precision, get_backend, get_differentiable
from .backends.torch import Backend, CamTerms, PositionPull, softmax_grad
from .closed_form import (
    Attended,
    ChannelMLP,
    Factors,
    Options,
    attend,
    features_grad,
    held_grads,
    like_parameters,
    mlp_grads,
    pull_back,
)
from .guidance import kl_guidance_with_grad
from .precision import as_type


class Function(torch.autograd.Function):
    """`torch.autograd.Function` that stores the signature of `forward`: `apply` looks it up at every call."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        vars(cls.forward)["__signature__"] = inspect.signature(cls.forward)


def forward_mode() -> bool:
    """Whether derivatives go forward (`torch.func.jvp`, `jacfwd`): only the contractions and torch's own
    operations have those."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def batched(grad: Tensor | None) -> bool:
    """Whether the gradient is a batch of gradients: `is_grads_batched`, or vmap around autograd."""
    return grad is not None and (is_legacy_batchedtensor(grad) or is_batchedtensor(grad))


class ChannelSum(Function):
    """channel_sum(A (N, C, L), s (N, C)) -> (N, L)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, weights: Tensor, backend: str) -> Tensor:
        return get_backend(backend).channel_sum(features, weights)

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
                ds = spatial_sum(features, u, ctx.backend)
        return da, ds, None


class SpatialSum(Function):
    """spatial_sum(A (N, C, L), t (N, L)) -> (N, C)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, weights: Tensor, backend: str) -> Tensor:
        return get_backend(backend).spatial_sum(features, weights)

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
                dt = channel_sum(features, w, ctx.backend)
        return da, dt, None


def channel_sum(features: Tensor, weights: Tensor, backend: str) -> Tensor:
    """ChannelSum, with a forward mode where it is asked for."""
    node: Any = ForwardChannelSum if forward_mode() else ChannelSum
    return node.apply(features, weights, backend)


def spatial_sum(features: Tensor, weights: Tensor, backend: str) -> Tensor:
    """SpatialSum, with a forward mode where it is asked for."""
    node: Any = ForwardSpatialSum if forward_mode() else SpatialSum
    return node.apply(features, weights, backend)


class ForwardChannelSum(ChannelSum):
    """ChannelSum with a jvp: torch.compile traces no Function that has one."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ChannelSum.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx: Any, da: Tensor, ds: Tensor, _: None) -> Tensor:
        features, s = ctx.saved_tensors
        return channel_sum(da, s, ctx.backend) + channel_sum(features, ds, ctx.backend)


class ForwardSpatialSum(SpatialSum):
    """SpatialSum with a jvp."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        SpatialSum.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx: Any, da: Tensor, dt: Tensor, _: None) -> Tensor:
        features, t = ctx.saved_tensors
        return spatial_sum(da, t, ctx.backend) + spatial_sum(features, dt, ctx.backend)


class Linear(Function):
    """y = x W^T + b for x (N, C), W (J, C) and b (J,) or None, of one type -> y (N, J)

        dx = dy W        dW = dy^T x        db = sum_n dy_n

    On a GPU torch's linear layer follows the TF32 switches; the backend's products do not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return get_backend(backend).product([x], weight.t(), bias)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.backend = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        # With create_graph=True use torch's operations, which have derivatives of every order.
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        backend = get_backend("torch" if again else ctx.backend)
        with full_precision(x):
            if ctx.needs_input_grad[0]:
                (dx,) = backend.product([dy], weight)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                ((dw, db),) = backend.layer_grads([(dy, x)])
        return dx, dw if ctx.needs_input_grad[1] else None, db if ctx.needs_input_grad[2] else None, None


class Attention(Function):
    """`attend` as one autograd node.  It returns the fields of `Attended`; the first four have gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor,
        fc1_weight: Tensor | None,
        fc1_bias: Tensor | None,
        fc2_weight: Tensor | None,
        fc2_bias: Tensor | None,
        attention: str,
        spatial_norm: str,
        pool_type: str,
        attention_scale: str,
        position_guidance: str,
        backend: str,
    ) -> tuple[Tensor, ...]:
        options = Options(attention, spatial_norm, pool_type, attention_scale, position_guidance)
        mlp = ChannelMLP(fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        return tuple(attend(get_backend(backend), features, mlp, options)[:-1])  # callers make S from e

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.backend = Options(*inputs[5:10]), inputs[10]
        ctx.save_for_backward(*inputs[:5], *output[1:])
        out = Attended(*output)
        constant = list(output[4:])
        if not ctx.options.guides_positions:
            constant.append(out.log_spatial)
        if not ctx.options.uses_channel:
            constant.append(out.channel_logits)
        if not ctx.options.uses_spatial:
            constant.append(out.spatial)
        ctx.mark_non_differentiable(*constant)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        features, w1, b1, w2, b2, *small = ctx.saved_tensors
        mlp, options = ChannelMLP(w1, b1, w2, b2), ctx.options
        attended = Attended(grads[0], *small)  # `pooled` is a placeholder here, and S is computed again
        # If strides are first read inside the context, Dynamo (torch 2.15) leaves the caller's autocast off.
        _ = features.stride()
        stages = get_backend(ctx.backend)
        with full_precision(features):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return _differentiable_backward(features, mlp, options, ctx.backend, grads[:4])
            return _backward(stages, ctx, features, mlp, options, attended, *grads[:4])


def _backward(
    backend: Backend,
    ctx: Any,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    grad_logits: Tensor,
    grad_spatial: Tensor,
    grad_log_spatial: Tensor,
) -> tuple[Tensor | None, ...]:
    f = pull_back(
        backend, features, mlp, options, attended, grad_pooled,
        grad_logits if options.uses_channel else None,
        grad_spatial if options.uses_spatial else None,
        pull=_log_softmax_pull(grad_log_spatial) if options.guides_positions else None,
    )  # fmt: skip
    da = None
    if ctx.needs_input_grad[0]:
        da = features_grad(backend, features, options, attended.spatial_weights, attended.peak_index, f)
    return da, *like_parameters(mlp_grads(backend, attended, f), mlp), *[None] * 6


def _log_softmax_pull(grad: Tensor) -> PositionPull:
    """dU = g - T sum_l g for g = dL / d log T, as w (T - q) with w = - sum_l g and q = g / sum_l g."""
    total = grad.sum(-1)
    safe = torch.where(total == 0, 1.0, total).unsqueeze(-1)
    return PositionPull(grad / safe, -total)


def _differentiable_backward(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    backend: str,
    grads: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """The backward under create_graph=True: by the contractions, which have derivatives of every order."""

    def forward(*inputs: Tensor | None) -> tuple[Tensor, ...]:
        assert inputs[0] is not None
        stages = get_differentiable(backend)
        return tuple(attend(stages, inputs[0], ChannelMLP(*inputs[1:]), options)[:4])

    given = [x for x in (features, *mlp) if x is not None]
    if torch._C._are_functorch_transforms_active():
        absent = [None] * (5 - len(given))  # all four MLP tensors are given, or none
        found = torch.func.vjp(lambda *inputs: forward(*inputs, *absent), *given)[1](tuple(grads))
        return *found, *[None] * (11 - len(found))
    # Outside of torch.func do not use vjp: it fails under saved-tensor hooks, which checkpointing sets.
    inputs = [None if x is None else x.view_as(x) for x in (features, *mlp)]
    outputs = [(y, dy) for y, dy in zip(forward(*inputs), grads, strict=True) if y.requires_grad]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    ys, dys = zip(*outputs, strict=True)
    pulled = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True, allow_unused=True))
    grad = [next(pulled) if x is not None and x.requires_grad else None for x in inputs]
    return *grad, *[None] * 6


class Guidance(Function):
    """(beta, S, guidance loss of each image, its gradient de) from the channel logits e; beta is constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        first: Tensor,
        spatial: Tensor | None,
        grad_map: Tensor | None,
        grad_mean: Tensor | None,
        positions: int,
        terms: tuple[str, float, str],
        backend: str,
    ) -> tuple[Tensor, ...]:
        beta_terms = CamTerms(first, spatial, grad_map, grad_mean)
        beta, *rest = get_backend(backend).guidance(logits, beta_terms, None, positions, *terms, 1.0)
        return first.view_as(first) if beta is first else beta, *rest  # no input may be an output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        beta, s, _, de = output
        ctx.terms = inputs[6]
        ctx.save_for_backward(inputs[0], beta.clone(), s, de)  # a copy: the caller may change beta in place
        ctx.mark_non_differentiable(beta, de)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, _beta: None, grad_s: Tensor | None, grad_loss: Tensor | None, _de: None
    ) -> tuple[Tensor | None, ...]:
        logits, beta, s, de = ctx.saved_tensors
        with full_precision(logits):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                log_s = torch.log_softmax(logits, -1)
                s = log_s.exp()
                if grad_loss is not None:
                    de = kl_guidance_with_grad(log_s, s, beta, *ctx.terms)[1]
            found = None if grad_loss is None else grad_loss.unsqueeze(-1) * de
            if grad_s is not None:
                of_s = softmax_grad(grad_s, s)
                found = of_s if found is None else found + of_s
        return found, *[None] * 7


class HeldGradient(Function):
    """entropy + guidance_weight * guidance; with guidance None, `entropy` is the whole loss already.

    The backward scales the held factors and writes dA from them.
    """

    @staticmethod
    def forward(
        entropy: Tensor,
        guidance: Tensor | None,
        features: Tensor,
        first: Tensor,
        channel: Tensor,
        grad_map: Tensor | None,
        grad_mean: Tensor | None,
        weights: Tensor,
        peak_index: Tensor,
        guidance_weight: float,
        options: Options,
        backend: str,
        products: tuple[bool, ...],
        *layers: Tensor | None,  # weight, bias, left, right of each `LayerGradient`
    ) -> Tensor:
        if guidance is None:
            return entropy.clone()
        return torch.add(entropy, guidance, alpha=guidance_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        flat = inputs[13:]
        ctx.save_for_backward(*inputs[2:9], *flat[2::4], *flat[3::4])
        ctx.options, ctx.backend, ctx.products = Options(*inputs[10]), *inputs[11:13]
        ctx.types = [None if p is None else p.dtype for p in (*flat[0::4], *flat[1::4])]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fused_ggam_loss can be differentiated once; create_graph=True and torch.func.grad need more "
                "derivatives: use GGAMLoss()(head(features, target), target)"
            )
        features, first, channel, grad_map, grad_mean, weights, peak_index, *rows = ctx.saved_tensors
        backend, count = get_backend(ctx.backend), len(ctx.products)
        lefts, rights = rows[:count], rows[count:]
        # If strides are first read inside the context, Dynamo (torch 2.15) leaves the caller's autocast off.
        _ = features.stride()
        da = None
        with full_precision(features):
            if ctx.needs_input_grad[2]:
                f = Factors(None, first, channel, grad_map, grad_mean, None, None)
                da = features_grad(backend, features, ctx.options, weights, peak_index, f, grad)
            layers = list(zip(lefts, rights, strict=True))
            pairs = held_grads(backend, layers, ctx.products, grad)
            grads: list[Tensor | None] = []
            for i, pair in enumerate(pairs):
                for gradient, dtype in zip(pair, (ctx.types[i], ctx.types[count + i]), strict=True):
                    grads.append(None if dtype is None else as_type(gradient, dtype))
                grads += [None, None]
        return grad, None, da, *[None] * 10, *grads


class Anchored(Function):
    """x, made to depend on `anchor`, to which no gradient flows.

    `scores_by_autograd` makes a leaf of an x that has no graph.  A compiled step cannot return a tensor that
    depends on a leaf made inside it, so x is given a graph first.
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
