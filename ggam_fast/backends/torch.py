"""The stages of GGAM over an (N, C, L) feature map, in torch operations.

`closed_form` and `step` are written once, in terms of these stages.  `triton.TritonBackend` implements them
with kernels, `differentiable.DifferentiableBackend` with derivatives of every order.  A is (N, C, L) of any
type.  All small tensors are float32, or float64 for float64 A.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ggam_fast.guidance import kl_guidance_with_grad, kl_positions, position_target
from ggam_fast.layer import BATCH_NORM, DROPOUT, ELU, LINEAR, RELU, Layer, LayerGradient, Link
from ggam_fast.norm import move, settle
from ggam_fast.precision import as_type, as_types, compute_dtype

aten = torch.ops.aten


def spatial_norm(u: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """T (N, L) from U (N, L), and sum(U) (N,).  "sum" of an all-zero map is uniform."""
    total = u.sum(-1)
    if norm == "softmax":
        return torch.softmax(u, -1), total
    if norm == "sigmoid":
        return torch.sigmoid(u), total
    empty = (total == 0).unsqueeze(-1)
    safe = total.unsqueeze(-1).masked_fill(empty, 1.0)
    return (u / safe).masked_fill(empty, 1.0 / u.shape[-1]), total


def spatial_norm_grad(dt: Tensor, t: Tensor, total: Tensor, norm: str) -> Tensor:
    """dU (N, L) from dT (N, L), for each of the three normalisations."""
    if norm == "sigmoid":
        return dt * t * (1 - t)
    centred = dt - (dt * t).sum(-1, keepdim=True)
    if norm == "softmax":
        return t * centred
    # Again, for the rounding of <dT, T>: where dT is constant, that is all there is of dU.
    centred = centred - (centred * t).sum(-1, keepdim=True)
    empty = (total == 0).unsqueeze(-1)
    return (centred / total.unsqueeze(-1).masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def softmax_grad(ds: Tensor, s: Tensor) -> Tensor:
    """de = S (dS - <dS, S>) (N, C), for S = softmax(e)."""
    # The aten operator is one launch, but it does not promote types: a compiled backward may run under the
    # caller's autocast with types that it was not traced with.  There the compiler fuses the formula anyway.
    if torch.compiler.is_compiling():
        return s * (ds - (ds * s).sum(-1, keepdim=True))
    return aten._softmax_backward_data(ds, s, -1, ds.dtype)


def relu_grad(dh: Tensor, hidden: Tensor) -> Tensor:
    """dh, but 0 where hidden <= 0."""
    # A formula for the compiler, for the reason given in `softmax_grad`.
    if torch.compiler.is_compiling():
        return torch.where(hidden <= 0, 0.0, dh)
    return aten.threshold_backward(dh, hidden, 0)


def batch_norm(
    layer: Layer, x: Tensor, gamma: Tensor | None, beta: Tensor | None, give: bool = False
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Batch norm of x (N, C), which updates the running statistics.

    With `give` it also returns the batch's mean and 1 / deviation, detached, or None if they were not
    computed.
    """
    # The operator behind F.batch_norm returns the statistics too.  For one image F.batch_norm has the error.
    give = give and layer.from_batch and x.shape[0] > 1
    own_mean, own_var, momentum = layer.running_mean, layer.running_var, layer.momentum
    settles = layer.moves and layer.settling and momentum is not None
    if own_mean is None or own_var is None or settles:
        if give:
            y, *saved = aten._native_batch_norm_legit.no_stats(x, gamma, beta, True, 0.0, layer.eps)
            found = (saved[0].detach(), saved[1].detach())
        else:
            y, found = F.batch_norm(x, None, None, gamma, beta, True, 0.0, layer.eps), None
        if settles and found is not None:  # the statistics are in hand, and another pass over x is not free
            mean, rstd = found
            move(layer, mean, (rstd.square().reciprocal() - layer.eps).clamp_min(0.0), x.shape[0])
        elif settles:
            assert momentum is not None
            settle(x, own_mean, own_var, layer.tracked, momentum)
        return y, found
    if layer.training and layer.tracked is not None:
        layer.tracked.add_(1)
        if momentum is None:  # the cumulative average of torch's BatchNorm
            momentum = 1.0 / float(layer.tracked)
    mean, var = as_types(x.dtype, own_mean, own_var)
    if give:
        y, *saved = aten._native_batch_norm_legit(x, gamma, beta, mean, var, True, momentum or 0.0, layer.eps)
        found = (saved[0].detach(), saved[1].detach())
    else:
        y = F.batch_norm(x, mean, var, gamma, beta, layer.training, momentum or 0.0, layer.eps)
        found = None
    if layer.training and mean is not own_mean:  # the statistics had another type and a copy was updated
        own_mean.copy_(mean)
        own_var.copy_(var)
    return y, found


def probabilities(logits: Tensor, target: Tensor) -> Tensor:
    """The target as class probabilities (N, K): one-hot for class indices."""
    if target.is_floating_point():
        return target.to(logits.dtype)
    return torch.zeros_like(logits, requires_grad=False).scatter(1, target.unsqueeze(1), 1.0)


class CamTerms(NamedTuple):
    """beta = first mean_l T / L + S mean_l dU + dg / L, for the gradients dU and dg of the class score."""

    first: Tensor  # (N, C)
    spatial: Tensor | None = None  # (N, L): T; None: the first term of beta is `first`
    grad_map: Tensor | None = None  # (N, L): dU
    grad_mean: Tensor | None = None  # (N, C): dg


def cam_weights(terms: CamTerms, s: Tensor | None, positions: int) -> Tensor:
    """beta (N, C) from its terms and S (N, C); S is needed only with a dU."""
    beta, spatial, grad_map, grad_mean = terms
    if spatial is not None:
        beta = beta * (spatial.mean(-1, keepdim=True) / positions)
    if grad_map is not None:
        assert s is not None
        beta = torch.addcmul(beta, s, grad_map.mean(-1, keepdim=True))
    if grad_mean is not None:
        # Not alpha=: torch.compile drops it when it fuses this add (torch 2.11 and 2.14).
        beta = beta + grad_mean / positions
    return beta


class Entropy(NamedTuple):
    """The cross entropy of each image and the seeds of both gradients; all are 0 for an ignored image."""

    losses: Tensor  # (N,)
    share: Tensor | None  # (N,): the weight of an image in a mean, 0 if ignored; None: equal weights
    score: Tensor  # (N, K): d y / d logits of the class score that Grad-CAM explains
    grad: Tensor  # (N, K): d mean(loss) / d logits


class PositionTerms(NamedTuple):
    """What the guidance of T needs besides dT."""

    norm: str  # q from dT: "relu" or "standardized_softmax"
    temperature: float
    log_spatial: Tensor  # (N, L): log T
    share: Tensor | None  # (N,): `Entropy.share`


class PositionGuidance(NamedTuple):
    """The target of T, and how far T is from it."""

    target: Tensor  # (N, L): q
    losses: Tensor  # (N,): KL(q, T), 0 for an ignored image


class PositionPull(NamedTuple):
    """The part weight share_n (T - q) of dU, times the scalar `scale` if it is given."""

    target: Tensor  # (N, L): q
    share: Tensor | None  # (N,): where it is 0 nothing is added; None: 1 / N
    weight: float = 1.0
    scale: Tensor | None = None  # ()


class Guided(NamedTuple):
    """beta, S and the guidance loss."""

    cam_weights: Tensor  # (N, C): beta
    channel: Tensor  # (N, C): S
    losses: Tensor  # (N,)
    grad_logits: Tensor  # (N, C): de
    guidance: Tensor  # (): its mean or sum over the batch
    loss: Tensor  # (): cross entropy plus weighted guidance; the guidance alone without a cross entropy
    positions: Tensor | None = None  # (): the mean of the position losses, if there are any


def position_grad(t: Tensor, pull: PositionPull) -> Tensor:
    """The part of dU (N, L) that pulls T to its target."""
    target, share, weight, scale = pull
    if share is None:
        found = (t - target) * (weight / max(t.shape[0], 1))
    else:
        # Not a product with 0, which would keep an ignored image's infinities and NaN.
        found = torch.where((share != 0).unsqueeze(-1), (t - target) * (share * weight).unsqueeze(-1), 0.0)
    return found if scale is None else found * scale


def scaled(tensors: Sequence[Tensor | None], scale: Tensor) -> list[Any]:
    """Each tensor times the scalar.

    The small ones share one launch.  That launch gives a large tensor too few programs (17 us for two of
    1 MB on an H100), so a large one has its own.
    """
    given = [x for x in tensors if x is not None]
    if torch.compiler.is_compiling():
        found = iter(torch._foreach_mul(given, scale) if given else ())
    elif torch._C._functorch.is_legacy_batchedtensor(scale):
        found = iter([x * scale for x in given])  # vmap has no rule for a list
    else:
        small = [x for x in given if x.numel() <= 1 << 16]
        scaled_small = iter(torch._foreach_mul(small, scale) if small else ())
        found = iter([next(scaled_small) if x.numel() <= 1 << 16 else x * scale for x in given])
    return [None if x is None else next(found) for x in tensors]


def rows_times(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix, for (N, R, K) and (N, K, M).

    On a CPU torch is much slower with a matrix times columns than with rows times a matrix.  Inductor turns a
    CPU's bmm of one row into a loop that walks down the columns, so compiled code uses baddbmm; for one image
    a loop is faster.  For a GPU Inductor would write A in float32 for baddbmm; a sum fuses the conversion.
    """
    if not torch.compiler.is_compiling():
        return torch.bmm(rows, matrix)
    if rows.device.type != "cpu" or _one_image(rows):
        return rows_times_by_sum(rows, matrix)
    return torch.baddbmm(rows.new_zeros(()), rows, matrix, beta=0)


def rows_times_by_sum(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix as a product and a sum over K."""
    return (rows.unsqueeze(-1) * matrix.unsqueeze(1)).sum(2)


def _one_image(x: Tensor) -> bool:
    """Whether torch.compile compiles for a CPU and a batch that is known to be one.

    False under torch.export: an exported program would store all products before it sums them.
    """
    if not torch.compiler.is_dynamo_compiling() or x.device.type != "cpu":
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy, as Dynamo has done

    return guard_or_false(x.shape[0] == 1)


def _attention_grads(
    a: Tensor, dt: Tensor, t: Tensor, total: Tensor, norm: str, pull: PositionPull | None
) -> list[tuple[Tensor, Tensor]]:
    """dU and ds for each of the R dT (N, R, L); `pull` adds to the last dU."""
    du = spatial_norm_grad(dt, t.unsqueeze(1), total.unsqueeze(1), norm)
    if pull is not None:
        last = du[:, -1] + position_grad(t, pull)
        du = torch.cat([du[:, :-1], last.unsqueeze(1)], 1)
    return list(zip(du.unbind(1), rows_times(du, a.transpose(1, 2)).unbind(1), strict=True))


class Backend:
    """The stages in torch operations; `A` is (N, C, L), `s` and `v` are (N, C), `t` is (N, L)."""

    def channel_sum(self, features: Tensor, weights: Tensor) -> Tensor:
        """out[n, l] = sum_c weights[n, c] A[n, c, l]."""
        return rows_times(weights.unsqueeze(1), as_type(features, compute_dtype(features))).squeeze(1)

    def spatial_sum(self, features: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """out[n, c] = scale * sum_l weights[n, l] A[n, c, l]; weights = 1 if None."""
        if weights is None:
            return features.sum(-1, dtype=compute_dtype(features)) * scale
        a = as_type(features, compute_dtype(features))
        return rows_times(weights.unsqueeze(1), a.transpose(1, 2)).squeeze(1) * scale

    def product(
        self,
        rows: Sequence[Tensor],
        matrix: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        relu: bool = False,
    ) -> list[Tensor]:
        """One or two `rows` (M, K), each times `matrix` (K, N), in the type of the rows.

        A bias (N,) is added and a ReLU applied, or the result is set to 0 where mask (M, N) <= 0.
        """
        x = rows[0]
        matrix, bias = as_types(x.dtype, matrix, bias)
        if len(rows) == 1 and _one_image(x) and matrix.shape[0] <= 256 and matrix.stride(0) == 1:
            # W has short rows in memory, as in fc2, and a loop over them is faster: 1 x 2048 x 14 x 14 takes
            # 370 us, with BLAS 396 (AMD EPYC, two threads:
            # `pytest bench/ -k 1x2048x14x14-float32-nchw-fwd`). For longer rows Inductor's loop is no faster
            # and may compute x again for each row.
            y = (x.unsqueeze(2) * matrix).sum(1)
            out = [y if bias is None else y + bias]
        elif len(rows) == 1:
            out = [x @ matrix if bias is None else torch.addmm(bias, x, matrix)]
        else:
            out = list((torch.stack(list(rows)) @ matrix).unbind(0))
            out = out if bias is None else [x + bias for x in out]
        if mask is not None:
            return [relu_grad(x, mask) for x in out]
        return [torch.relu(x) for x in out] if relu else out

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether the backend has its own `product` for this type; otherwise it uses torch's."""
        return False

    def batch_norm(self, x: Tensor, layer: Layer, follows: Layer | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """act(norm(x)) of x (N, C), and the tensors that `batch_norm_grad` needs.

        act is the ELU or ReLU in `follows`, if any.  Running statistics are updated.  Autograd does not
        differentiate this.
        """
        if not x.shape[0]:  # no batch, no statistics
            return x.clone(), ()
        gamma, beta = as_types(x.dtype, layer.weight, layer.bias)
        y, statistics = batch_norm(layer, x, gamma, beta, give=True)
        saved: tuple[Tensor, ...] = () if statistics is None else statistics
        if follows is None:
            return y, saved
        return F.elu(y, follows.alpha) if follows.kind == ELU else torch.relu(y), (*saved, y)

    def batch_norm_grad(
        self,
        rows: Sequence[Tensor],
        x: Tensor,
        layer: Layer,
        follows: Layer | None,
        saved: tuple[Tensor, ...],
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """dx for each of one or two dy (N, C), and d gamma and d beta (C,) for the last dy."""
        gamma, from_batch = as_types(x.dtype, layer.weight)[0], layer.from_batch
        affine = layer.weight is not None or layer.bias is not None
        if not x.shape[0]:
            dgamma, dbeta = x.new_zeros(2, x.shape[1]).unbind(0) if affine else (None, None)
            return list(rows), dgamma, dbeta
        if from_batch:
            mean, scale = saved[:2]
            variance = mean
        else:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            mean, variance = layer.running_mean.to(x.dtype), layer.running_var.to(x.dtype)
            scale = torch.rsqrt(variance + layer.eps)
        if follows is not None:
            y = saved[-1]
            rows = [
                aten.threshold_backward(v, y, 0) if follows.kind == RELU
                else aten.elu_backward(v, follows.alpha, 1, 1, False, y)
                for v in rows
            ]  # fmt: skip
        # Without a weight CUDA returns no bias gradient either.  With the batch's own statistics torch's
        # backward does not use the variance, but CUDA requires one.
        weight = torch.ones_like(mean) if affine and gamma is None else gamma
        pulled = [
            aten.native_batch_norm_backward(
                row,
                x,
                weight,
                mean,
                variance,
                mean,
                scale,
                from_batch,
                layer.eps,
                [True, affine, affine],
            )
            for row in rows
        ]
        _, dgamma, dbeta = pulled[-1]
        return [dx for dx, _, _ in pulled], dgamma if affine else None, dbeta if affine else None

    def chain(self, links: Sequence[Link], x: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The classifier's output for x (N, C), and the tensors of each link that `chain_grad` needs.

        The first tensor of a link is its input.  Running statistics are updated.  Autograd does not
        differentiate this.
        """
        given: list[tuple[Tensor, ...]] = []
        for layer, follows, *_ in links:
            saved: tuple[Tensor, ...] = ()
            if layer.kind == LINEAR:
                assert layer.weight is not None
                if self.multiplies(x.dtype):
                    (y,) = self.product([x], layer.weight.t(), layer.bias)
                else:
                    weight, bias = as_types(x.dtype, layer.weight, layer.bias)
                    y = F.linear(x, weight, bias)
            elif layer.kind == BATCH_NORM:
                y, saved = self.batch_norm(x, layer, follows)
            elif layer.kind == DROPOUT:
                mask = F.dropout(torch.ones_like(x), layer.p)
                y, saved = x * mask, (mask,)
            else:
                y = F.elu(x, layer.alpha) if layer.kind == ELU else torch.relu(x)
            given.append((x, *saved))
            x = y
        return x, given

    def chain_grad(
        self, links: Sequence[Link], given: Sequence[tuple[Tensor, ...]], rows: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        """dx for each of one or two dy (N, K), and the layers' gradients for the last dy, in reverse."""
        gradients: list[LayerGradient] = []
        for (layer, follows, *_), (x, *saved) in zip(reversed(links), reversed(given), strict=True):
            if layer.kind == LINEAR:
                assert layer.weight is not None
                gradients.append(LayerGradient(layer.weight, layer.bias, rows[-1], x, True))
                rows = self.product(rows, layer.weight)
            elif layer.kind == BATCH_NORM:
                rows, dgamma, dbeta = self.batch_norm_grad(rows, x, layer, follows, tuple(saved))
                if dgamma is not None and dbeta is not None:
                    gradients.append(LayerGradient(layer.weight, layer.bias, dgamma, dbeta, False))
            elif layer.kind == DROPOUT:
                rows = [v * saved[0] for v in rows]
            elif layer.kind == RELU:
                rows = [aten.threshold_backward(v, x, 0) for v in rows]
            else:
                rows = [aten.elu_backward(v, layer.alpha, 1, 1, False, x) for v in rows]
        return rows, gradients

    def layer_grads(
        self, factors: Sequence[tuple[Tensor, Tensor]], scale: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """scale dy^T x and scale times the sum of dy over the batch, for each layer's dy (N, J), x (N, C)."""
        found = []
        for dy, x in factors:
            # The narrower of the two factors is scaled.
            by_dy, bias = dy.shape[1] <= x.shape[1], dy.sum(0)
            if scale is not None:
                narrower, bias = scaled([dy if by_dy else x, bias], scale)
                dy, x = (narrower, x) if by_dy else (dy, narrower)
            found.append((dy.t() @ x, bias))
        return found

    def channel_mlp(
        self, mean: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """relu(FC1(g)) (N, J) and e = FC2(relu(FC1(g))) (N, C), in the type of g (N, C)."""
        (hidden,) = self.product([mean], fc1_weight.t(), fc1_bias, relu=True)
        (logits,) = self.product([hidden], fc2_weight.t(), fc2_bias)
        return hidden, logits

    def channel_mlp_grad(
        self, de: Tensor, hidden: Tensor, fc1_weight: Tensor, fc2_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dh (N, J), before the ReLU, and dg (N, C), for `de` (N, C) and hidden = relu(FC1(g)) (N, J)."""
        (dh,) = self.product([de], fc2_weight, mask=hidden)
        (dg,) = self.product([dh], fc1_weight)
        return dh, dg

    def softmax(self, logits: Tensor) -> Tensor:
        """S = softmax(e) (N, C)."""
        return torch.softmax(logits, -1)

    def softmax_grad(
        self, ds: Tensor, s: Tensor, extra: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """de (N, C) from dS for S = softmax(e), plus scale times `extra`."""
        de = softmax_grad(ds, s)
        if extra is None:
            return de
        return de + (extra if scale is None else extra * scale)

    def multiply(self, x: Tensor, y: Tensor, kappa: int) -> Tensor:
        """kappa x y, all (N, C)."""
        return x * y if kappa == 1 else x * y * kappa

    def spatial_attention(
        self, features: Tensor, s: Tensor, norm: str, kappa: int = 1, log: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """T, kappa T (empty for kappa = 1), sum(U) for U = channel_sum(A, s), and log T.

        log T is for "softmax", and empty unless `log`.
        """
        u = self.channel_sum(features, s)
        t, total = spatial_norm(u, norm)
        log_t = torch.log_softmax(u, -1) if log else t.new_empty(0)
        return t, t.new_empty(0) if kappa == 1 else t * kappa, total, log_t

    def attended(
        self, features: Tensor, s: Tensor, norm: str, pool_type: str, kappa: int = 1, log: bool = False
    ) -> tuple[Tensor, ...]:
        """A pooled under kappa T: (pooled, argmax), and what `spatial_attention` returns.

        For "max", `pooled` is A at the argmax, not multiplied by kappa T.
        """
        t, weights, *rest = self.spatial_attention(features, s, norm, kappa, log)
        return *self.pool(features, t if kappa == 1 else weights, s, pool_type), t, weights, *rest

    def pool(self, features: Tensor, t: Tensor | None, s: Tensor, pool_type: str) -> tuple[Tensor, Tensor]:
        """The attended mean, A at the attended maximum, or D; and the argmax, empty except for "max"."""
        if pool_type == "max":
            return self.max_pool(features, t)
        index = torch.empty(0, dtype=torch.int64, device=features.device)
        if pool_type == "avg":
            return self.spatial_sum(features, t, 1.0 / features.shape[2]), index
        return self.hadamard(features, t, s, pool_type == "flatten"), index

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
        """dU (N, L) and ds = spatial_sum(A, dU) (N, C), for dT = scale channel_sum(A, v) + extra.

        `grads` holds one gradient v (N, C), or two that share their reads of A.  `extra` needs a single v.
        `pull` adds to the dU of the last one.
        """
        a = as_type(features, compute_dtype(features))
        dt = scale * rows_times(torch.stack(list(grads), 1), a)
        dt = dt if extra is None else dt + extra.unsqueeze(1)
        return _attention_grads(a, dt, t, total, norm, pull)

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
        """`attention_backward`, and the guidance of T by the dT of the first v.

        It is added to the dU of a second v, times the weight.
        """
        a = as_type(features, compute_dtype(features))
        dt = scale * rows_times(torch.stack(list(grads), 1), a)
        found = self.position_guidance(dt[:, 0], terms)
        pull = PositionPull(found.target, terms.share, weight) if len(grads) > 1 else None
        return _attention_grads(a, dt, t, total, norm, pull), found

    def spatial_attention_grad(
        self,
        features: Tensor,
        v: Tensor,
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
        pull: PositionPull | None = None,
    ) -> Tensor:
        """dU for dT = scale channel_sum(A, v) + extra."""
        return self.spatial_norm_grad(self.channel_sum(features, v), scale, extra, t, total, norm, pull)

    def guided_spatial_attention_grad(
        self,
        features: Tensor,
        v: Tensor,
        scale: float,
        t: Tensor,
        total: Tensor,
        norm: str,
        terms: PositionTerms,
    ) -> tuple[Tensor, PositionGuidance]:
        """`spatial_attention_grad`, and the guidance of T by dT."""
        dt = self.channel_sum(features, v)
        return self.spatial_norm_grad(dt, scale, None, t, total, norm), self.position_guidance(dt, terms)

    def spatial_norm_grad(
        self,
        dt: Tensor,
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
        pull: PositionPull | None = None,
    ) -> Tensor:
        """dU for dT = scale dt + extra, plus `pull`; dt is (N, L), or (N, P, L) in P parts."""
        if dt.dim() == 3:
            dt = dt.sum(1)
        dt = dt if scale == 1 else dt * scale
        du = spatial_norm_grad(dt if extra is None else dt + extra, t, total, norm)
        return du if pull is None else du + position_grad(t, pull)

    def position_guidance(self, class_map: Tensor, terms: PositionTerms) -> PositionGuidance:
        """The guidance of T by dT (N, L), or (N, P, L) in P parts; a positive factor of dT changes nothing.

        Autograd does not differentiate this.
        """
        norm, temperature, log_t, share = terms
        dt = class_map.detach()
        target = position_target(dt.sum(1) if dt.dim() == 3 else dt, norm, temperature)
        losses = kl_positions(target, log_t.detach())
        return PositionGuidance(target, losses if share is None else torch.where(share > 0, losses, 0.0))

    def max_pool(self, features: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """A at the position of max_l t_l A_cl (N, C), and that position; ties go to the first."""
        dtype = compute_dtype(features)
        d = features if t is None else features.detach() * t.detach().unsqueeze(1)
        index = d.max(-1).indices
        return features.gather(2, index.unsqueeze(-1)).squeeze(-1).to(dtype), index

    def position_scatter(self, values: Tensor, index: Tensor, positions: int) -> Tensor:
        """out[n, l] = sum over c with index[n, c] = l of values[n, c]."""
        out = values.new_zeros(values.shape[0], positions)
        if values.device.type == "cpu":
            return out.scatter_add(1, index, values)
        # On a GPU scatter_add uses atomics; index_put sorts and gives the same bits every run.
        rows = torch.arange(values.shape[0], device=values.device).unsqueeze(-1)
        return out.index_put((rows, index), values, accumulate=True)

    def hadamard(self, features: Tensor, t: Tensor | None, s: Tensor, for_flatten: bool) -> Tensor:
        """D = A * t, or A * s without t.

        With `for_flatten` D is NCL-contiguous and has the type of the small tensors.  Otherwise it has the
        layout and type of A.
        """
        d = features * (s.unsqueeze(2) if t is None else t.unsqueeze(1))
        # Only if it changes something: torch 2.11's compiler drops the gradient of an autograd Function's
        # output after a .contiguous() or .to() that does nothing.
        if for_flatten:
            return d if d.is_contiguous() else d.contiguous()
        return as_type(d, features.dtype)

    def guidance(
        self,
        logits: Tensor,
        terms: CamTerms,
        ds: Tensor | None,
        positions: int,
        cam_norm: str,
        temperature: float,
        divergence: str,
        weight: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """beta and S (N, C), the guidance loss of each image (N,), and de (N, C).

        de is weight times the gradient of that loss for constant beta, plus the part that a given dS adds.
        """
        log_s = torch.log_softmax(logits, -1)
        s = log_s.exp()
        beta = cam_weights(terms, s, positions)
        loss, de = kl_guidance_with_grad(log_s, s, beta, cam_norm, temperature, divergence)
        de = de if weight == 1.0 else de * weight
        return beta, s, loss, de if ds is None else de + softmax_grad(ds, s)

    def guided_loss(
        self,
        logits: Tensor,
        terms: CamTerms,
        ds: Tensor | None,
        positions: int,
        cam_norm: str,
        temperature: float,
        divergence: str,
        weight: float,
        mean: bool,
        share: Tensor | None,
        losses: Tensor | None,
        position_losses: Tensor | None = None,
        position_weight: float = 0.0,
    ) -> Guided:
        """`guidance`, reduced over the images, and the whole loss.

        `share` (N,) says which images count; None: all.  de is the gradient of the weighted and reduced
        guidance, plus the part that a given dS adds.  The whole loss is the mean of the cross entropies
        `losses` (N,) plus the weighted guidance, plus the weighted mean of the `position_losses` (N,).
        """
        batch = max(logits.shape[0], 1)
        if share is None:
            each = weight / batch if mean else weight
            beta, s, per_image, de = self.guidance(
                logits, terms, ds, positions, cam_norm, temperature, divergence, each
            )
            guidance = per_image.sum() / batch if mean else per_image.sum()
        else:
            beta, s, per_image, de = self.guidance(
                logits, terms, None, positions, cam_norm, temperature, divergence, weight
            )
            counts = share if mean else (share > 0).to(share.dtype)
            # Not a product with 0, which would keep an ignored image's infinities and NaN.
            per_image = torch.where(share > 0, per_image, 0.0)
            de = torch.where((share > 0).unsqueeze(-1), de * counts.unsqueeze(-1), 0.0)
            de = de if ds is None else de + softmax_grad(ds, s)
            guidance = (per_image * counts).sum()
        of_positions = None
        if position_losses is not None:
            of_positions = (position_losses / batch if share is None else position_losses * share).sum()
        if losses is None:
            return Guided(beta, s, per_image, de, guidance, guidance, of_positions)
        entropy = losses.sum() / batch if share is None else (losses * share).sum()
        loss = torch.add(entropy, guidance, alpha=weight)
        if of_positions is not None:
            loss = torch.add(loss, of_positions, alpha=position_weight)
        return Guided(beta, s, per_image, de, guidance, loss, of_positions)

    def cross_entropy(
        self, logits: Tensor, target: Tensor, smoothing: float, cam_class: str, ignore_index: int | None
    ) -> Entropy:
        """The loss of each image for labels (N,) or probabilities (N, K), and the seeds of both gradients.

        Probabilities need not sum to one.  Autograd does not differentiate this.
        """
        hard = not target.is_floating_point()
        share = counts = None
        if hard and ignore_index is not None:
            counts = target != ignore_index
            share = counts.to(logits.dtype) / counts.sum().clamp(min=1)
            target = target.masked_fill(~counts, 0)
            logits = torch.where(counts.unsqueeze(-1), logits, 0.0)
        losses = F.cross_entropy(
            logits, target if hard else target.to(logits.dtype), reduction="none", label_smoothing=smoothing
        )
        q = probabilities(logits, target)
        y = q if cam_class == "label" else probabilities(logits, logits.argmax(-1))
        if smoothing:
            q = q * (1.0 - smoothing) + smoothing / logits.shape[1]
        p = torch.softmax(logits, -1)
        grad = p - q if hard else p * q.sum(-1, keepdim=True) - q
        if share is None or counts is None:
            return Entropy(losses, None, y, grad / max(logits.shape[0], 1))
        return Entropy(losses * counts, share, y * counts.unsqueeze(-1), grad * share.unsqueeze(-1))

    def class_scores(
        self, logits: Tensor, target: Tensor, cam_class: str, ignore_index: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """d y / d logits (N, K) of the class score, 0 for an ignored image, and `Entropy.share`."""
        share = None
        if ignore_index is not None and not target.is_floating_point():
            counts = target != ignore_index
            share = counts.to(logits.dtype) / counts.sum().clamp(min=1)
            target = target.masked_fill(~counts, 0)
        y = probabilities(logits, logits.detach().argmax(-1) if cam_class == "predicted" else target)
        return y if share is None else torch.where((share > 0).unsqueeze(-1), y, 0.0), share

    def parameter_grads(
        self, factors: Sequence[tuple[Tensor, Tensor]], vectors: Sequence[Tensor], scale: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """`layer_grads` of the factors, and the vectors, both times the scale."""
        return self.layer_grads(factors, scale), list(vectors) if scale is None else scaled(vectors, scale)

    def grad_cam_means(
        self, features: Tensor, grad: Tensor, t: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mean_l G t (N, C), sum_l G A (N, C), sum_c G A (N, L)."""
        dtype = compute_dtype(features)
        a, g = features.to(dtype), grad.to(dtype)
        product = a * g
        means = (g if t is None else g * t.unsqueeze(1)).mean(-1)
        return means, product.sum(2), product.sum(1)

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
        """dA = scale (first-term + s (x) du + dg/L (x) 1).

        The first term is x (x) t / L for average pooling, x (x) t at the argmax for max pooling, and G t for
        a dense G (N, C, L).  `first` is x (N, C) or G.
        """
        if scale is not None:
            first, du, grad_mean = scaled([first, du, grad_mean], scale)
        positions = features.shape[2]
        constant = torch.zeros_like(s) if grad_mean is None else grad_mean / positions
        if pool_type == "avg":
            first, t = (first / positions, None) if t is None else (first, t / positions)
        # Computed in the memory order of A, so that dA has its layout.
        channels_last = features.stride(1) == 1 and features.shape[2] > 1
        c, l = (1, 2) if channels_last else (2, 1)  # where the axes of l and of c are inserted
        eager_cpu = features.device.type == "cpu" and not torch.compiler.is_compiling()
        if eager_cpu and pool_type == "avg" and t is not None and du is not None:
            # One matrix product writes dA once.  Compiled, Inductor fuses the multiply-adds below instead.
            # On a GPU the product could be rounded to TF32.
            left = torch.stack([first, s, constant], -1)
            right = torch.stack([t, du, torch.ones_like(du)], -1)
            if channels_last:
                left, right = right, left
            da = left @ right.transpose(1, 2)
            return as_type(da.transpose(1, 2) if channels_last else da, features.dtype)
        if pool_type == "avg":
            x = first.unsqueeze(c)
        elif pool_type == "max":
            every = torch.arange(positions, device=features.device)
            x = torch.where(index.unsqueeze(c) == every.unsqueeze(l - 1), first.unsqueeze(c), 0.0)
        else:
            x = (first.transpose(1, 2) if channels_last else first).contiguous()
            x = x if t is not None else x * s.unsqueeze(c)
        if t is None:
            da = constant.unsqueeze(c) + x
        else:
            da = torch.addcmul(constant.unsqueeze(c), x, t.unsqueeze(l))
            del x  # so that only two maps are in memory
        if du is not None:
            da = torch.addcmul(da, s.unsqueeze(c), du.unsqueeze(l))
        da = as_type(da, features.dtype)
        dense = features.transpose(1, 2).shape if channels_last else features.shape
        if da.shape != dense:
            da = da.expand(dense).contiguous()  # no broadcast view: a hook may change dA in place
        return da.transpose(1, 2) if channels_last else da


TORCH = Backend()
