"""The stages of GGAM over an (N, C, L) feature map, in torch operations.

This is the closed form's vocabulary: `attention` and `gradcam` are written once in these terms.
`ops.TritonStages` does the same with kernels, `contractions.DifferentiableStages` so that derivatives
of any order exist.  A is (N, C, L) of any type; everything small is float32, or float64 for float64 A.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import as_type, compute_dtype
from .guidance import kl_guidance_with_grad


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
    """dU (N, L) from dT (N, L): of each of the three normalisations."""
    if norm == "sigmoid":
        return dt * t * (1 - t)
    centred = dt - (dt * t).sum(-1, keepdim=True)
    if norm == "softmax":
        return t * centred
    empty = (total == 0).unsqueeze(-1)
    return (centred / total.unsqueeze(-1).masked_fill(empty, 1.0)).masked_fill(empty, 0.0)


def softmax_grad(ds: Tensor, s: Tensor) -> Tensor:
    """de = S (dS - <dS, S>) (N, C), for S = softmax(e)."""
    # One launch, but where the compiler fuses it anyway: a compiled backward may run under the caller's
    # autocast with types that it was not traced with, and this operator does not promote.
    if torch.compiler.is_compiling():
        return s * (ds - (ds * s).sum(-1, keepdim=True))
    return torch.ops.aten._softmax_backward_data(ds, s, -1, ds.dtype)


def relu_grad(dh: Tensor, hidden: Tensor) -> Tensor:
    """dh, but 0 where hidden <= 0"""
    # As for `softmax_grad`.
    if torch.compiler.is_compiling():
        return torch.where(hidden <= 0, 0.0, dh)
    return torch.ops.aten.threshold_backward(dh, hidden, 0)


class CamTerms(NamedTuple):
    """beta = first mean_l T / L + S mean_l dU + dg / L, for the gradients dU and dg of the class score."""

    first: Tensor  # (N, C)
    spatial: Tensor | None = None  # (N, L): T; None: beta takes `first` as it is
    grad_map: Tensor | None = None  # (N, L): dU
    grad_mean: Tensor | None = None  # (N, C): dg


def cam_weights(terms: CamTerms, s: Tensor | None, positions: int) -> Tensor:
    """beta (N, C) from its terms and S (N, C), which is only asked for where there is a dU."""
    beta, spatial, grad_map, grad_mean = terms
    if spatial is not None:
        beta = beta * (spatial.mean(-1, keepdim=True) / positions)
    if grad_map is not None:
        assert s is not None
        beta = torch.addcmul(beta, s, grad_map.mean(-1, keepdim=True))
    if grad_mean is not None:
        # Not alpha=: the compiler drops it from a product that it adds (torch 2.11 and 2.14).
        beta = beta + grad_mean / positions
    return beta


def scaled(tensors: Sequence[Tensor | None], scale: Tensor) -> list[Any]:
    """Each tensor times the scalar: the small ones in one launch, which gives a large one few programs (17 us
    for two of 1 MB on an H100)."""
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

    Rows times a matrix, as torch on a CPU is much slower with a matrix times columns.  Compiled by baddbmm,
    as Inductor turns a CPU's bmm of one row into a loop that walks down the columns; of one image alone loops
    are faster.  For a GPU Inductor would write A in float32 for a call of baddbmm: there a sum takes the
    conversion in."""
    if not torch.compiler.is_compiling():
        return torch.bmm(rows, matrix)
    if rows.device.type != "cpu" or _one_image(rows):
        return rows_times_by_sum(rows, matrix)
    return torch.baddbmm(rows.new_zeros(()), rows, matrix, beta=0)


def rows_times_by_sum(rows: Tensor, matrix: Tensor) -> Tensor:
    """The same as a sum over K."""
    return (rows.unsqueeze(-1) * matrix.unsqueeze(1)).sum(2)


def _one_image(x: Tensor) -> bool:
    """Whether torch.compile is at work on a CPU for a batch of one.  Not torch.export, whose programs would
    hold all that is to be summed; a batch of unknown size stays unknown."""
    if not torch.compiler.is_dynamo_compiling() or x.device.type != "cpu":
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy, as Dynamo has done

    return guard_or_false(x.shape[0] == 1)


class Stages:
    """The stages in torch operations; `A` is (N, C, L), `s` and `v` are (N, C), `t` is (N, L)."""

    def channel_sum(self, features: Tensor, weights: Tensor) -> Tensor:
        """out[n, l] = sum_c weights[n, c] A[n, c, l]"""
        return rows_times(weights.unsqueeze(1), as_type(features, compute_dtype(features))).squeeze(1)

    def spatial_sum(self, features: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """out[n, c] = scale * sum_l weights[n, l] A[n, c, l]; weights = 1 if None"""
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
        """Each of one or two (M, K) times (K, N): with a bias (N,) and a ReLU, or 0 where mask <= 0"""
        x = rows[0]
        if len(rows) == 1 and _one_image(x) and matrix.shape[0] <= 256 and matrix.stride(0) == 1:
            # A loop over short rows of W in memory, as those of fc2: 1 x 2048 x 14 x 14 takes 370 us so, with
            # BLAS 396 (AMD EPYC, two threads: `pytest bench/ -k 1x2048x14x14-float32-nchw-fwd`). Longer rows
            # Inductor does not read faster, and it may compute x anew for each.
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

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b for x (N, C) and W (J, C), which autograd can go through"""
        return F.linear(x, weight, bias)

    def layer_grads(
        self, factors: Sequence[tuple[Tensor, Tensor]], scale: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """scale dy^T x and scale times the sum of dy over the batch, of each layer's dy (N, J), x (N, C)"""
        found = []
        for dy, x in factors:
            # Of the two factors the narrower one is scaled.
            by_dy, bias = dy.shape[1] <= x.shape[1], dy.sum(0)
            if scale is not None:
                narrower, bias = scaled([dy if by_dy else x, bias], scale)
                dy, x = (narrower, x) if by_dy else (dy, narrower)
            found.append((dy.t() @ x, bias))
        return found

    def channel_mlp(
        self, mean: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """relu(FC1(g)) (N, J) and e = FC2(relu(FC1(g))) (N, C) of g (N, C), in its type"""
        w1, b1, w2, b2 = (as_type(p, mean.dtype) for p in (fc1_weight, fc1_bias, fc2_weight, fc2_bias))
        (hidden,) = self.product([mean], w1.t(), b1, relu=True)
        (logits,) = self.product([hidden], w2.t(), b2)
        return hidden, logits

    def spatial_attention(self, features: Tensor, s: Tensor, norm: str) -> tuple[Tensor, Tensor]:
        """T and sum(U) for U = channel_sum(A, s)"""
        return spatial_norm(self.channel_sum(features, s), norm)

    def attended(self, features: Tensor, s: Tensor, norm: str, pool_type: str) -> tuple[Tensor, ...]:
        """T and A pooled under it: (pooled, argmax, T, sum(U)); for "max", A at the argmax before T"""
        t, total = self.spatial_attention(features, s, norm)
        return *self.pool(features, t, s, pool_type), t, total

    def pool(self, features: Tensor, t: Tensor | None, s: Tensor, pool_type: str) -> tuple[Tensor, Tensor]:
        """The attended mean, A at the attended maximum, or D; and the argmax, empty but for "max" """
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
    ) -> list[tuple[Tensor, Tensor]]:
        """dU (N, L) and ds = spatial_sum(A, dU) (N, C) of one gradient v (N, C), or of two that share their
        reads of A, for dT = scale channel_sum(A, v) + extra; only one alone may have an extra"""
        a = as_type(features, compute_dtype(features))
        dt = scale * rows_times(torch.stack(list(grads), 1), a)
        dt = dt if extra is None else dt + extra.unsqueeze(1)
        du = spatial_norm_grad(dt, t.unsqueeze(1), total.unsqueeze(1), norm)
        return list(zip(du.unbind(1), rows_times(du, a.transpose(1, 2)).unbind(1), strict=True))

    def spatial_attention_grad(
        self,
        features: Tensor,
        v: Tensor,
        scale: float,
        extra: Tensor | None,
        t: Tensor,
        total: Tensor,
        norm: str,
    ) -> Tensor:
        """dU for dT = scale channel_sum(A, v) + extra"""
        return self.spatial_norm_grad(scale * self.channel_sum(features, v), extra, t, total, norm)

    def spatial_norm_grad(
        self, dt: Tensor, extra: Tensor | None, t: Tensor, total: Tensor, norm: str
    ) -> Tensor:
        """dU for dT = dt + extra; dt may be (N, L), or (N, P, L) in P parts"""
        if dt.dim() == 3:
            dt = dt.sum(1)
        return spatial_norm_grad(dt if extra is None else dt + extra, t, total, norm)

    def max_pool(self, features: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """A at the position of max_l t_l A_cl (N, C), and that position; ties go to the first"""
        dtype = compute_dtype(features)
        d = features if t is None else features.detach() * t.detach().unsqueeze(1)
        index = d.max(-1).indices
        return features.gather(2, index.unsqueeze(-1)).squeeze(-1).to(dtype), index

    def position_scatter(self, values: Tensor, index: Tensor, positions: int) -> Tensor:
        """out[n, l] = sum over c with index[n, c] = l of values[n, c]"""
        out = values.new_zeros(values.shape[0], positions)
        if values.device.type == "cpu":
            return out.scatter_add(1, index, values)
        # scatter_add adds with atomics on a GPU; index_put sorts and gives the same bits every run.
        rows = torch.arange(values.shape[0], device=values.device).unsqueeze(-1)
        return out.index_put((rows, index), values, accumulate=True)

    def hadamard(self, features: Tensor, t: Tensor | None, s: Tensor, for_flatten: bool) -> Tensor:
        """D = A * t, or A * s without t.  For a flattening classifier D is NCL-contiguous and as
        precise as the small tensors; otherwise it has A's layout and type."""
        d = features * (s.unsqueeze(2) if t is None else t.unsqueeze(1))
        # Only where it changes something: torch 2.11's compiler drops the gradient of an autograd
        # Function's output that a no-op .contiguous() or .to() returned.
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
        mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """beta and S (N, C), the guidance loss of each image (N,), and de (N, C): weight times the gradient
        of the batch's mean or sum of it, for constant beta, plus what dS brings, if given"""
        log_s = torch.log_softmax(logits, -1)
        s = log_s.exp()
        beta = cam_weights(terms, s, positions)
        loss, de = kl_guidance_with_grad(log_s, s, beta, cam_norm, temperature, divergence)
        de = de * (weight / max(logits.shape[0], 1) if mean else weight)
        return beta, s, loss, de if ds is None else de + softmax_grad(ds, s)

    def grad_cam_means(
        self, features: Tensor, grad: Tensor, t: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """mean_l G t (N, C), sum_l G A (N, C), sum_c G A (N, L)"""
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
        """dA = scale (first-term + s (x) du + dg/L (x) 1), where the first term is x (x) t / L of an average,
        x (N, C) at the argmax, or G (x) t of a dense `first` G (N, C, L)"""
        if scale is not None:
            first, du, grad_mean = scaled([first, du, grad_mean], scale)
        positions = features.shape[2]
        constant = torch.zeros_like(s) if grad_mean is None else grad_mean / positions
        if pool_type == "avg":
            first, t = (first / positions, None) if t is None else (first, t / positions)
        # Computed in the memory order of A, so that dA has its layout.
        channels_last = features.stride(1) == 1 and features.shape[2] > 1
        c, l = (1, 2) if channels_last else (2, 1)  # where to insert the other's axis
        eager_cpu = features.device.type == "cpu" and not torch.compiler.is_compiling()
        if eager_cpu and pool_type == "avg" and t is not None and du is not None:
            # One product that writes dA once, as Inductor makes of the multiply-adds below; on a GPU it
            # could be rounded to TF32.
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
            del x  # so that no third map is held
        if du is not None:
            da = torch.addcmul(da, s.unsqueeze(c), du.unsqueeze(l))
        da = as_type(da, features.dtype)
        dense = features.transpose(1, 2).shape if channels_last else features.shape
        if da.shape != dense:
            da = da.expand(dense).contiguous()  # a hook may change it in place
        return da.transpose(1, 2) if channels_last else da
