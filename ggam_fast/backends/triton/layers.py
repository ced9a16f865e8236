"""The layers of the classifier and of the channel MLP: products, and batch norms with their activation.

A chain of layers is one stage: all its launches are described before the first is made.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ggam_fast.backends.registry import full_precision
from ggam_fast.backends.torch import TORCH
from ggam_fast.layer import BATCH_NORM, ELU, LINEAR, Layer, LayerGradient, Link, chain_of

from .launch import FP_FUSION, Empty, Row, Work, Zeros, launch_all, plan, thread
from .register import FUNCTIONS, KernelBackend, operator

from ggam_fast.kernels import batch_norm as batch_norm_kernels  # isort: skip
from ggam_fast.kernels import product as product_kernels  # isort: skip

_FIXED, _CUMULATIVE, _SETTLING = range(3)
_NONE, _RELU, _ELU = range(3)
Rows = Sequence[Tensor | Empty]


class Layers(KernelBackend):
    """The stages of this file for float32; torch's for other types.

    Only products are operators.  An operator would hide that a batch norm changes its running statistics.
    """

    @property
    def _eager(self) -> bool:
        return self.run is FUNCTIONS

    def multiplies(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float32

    def product(
        self,
        rows: Sequence[Tensor],
        matrix: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        relu: bool = False,
    ) -> list[Tensor]:
        if rows[0].dtype != torch.float32:
            return super().product(rows, matrix, bias, mask, relu)
        if matrix.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
            matrix, bias = matrix.float(), None if bias is None else bias.float()
        x, x_1 = rows if len(rows) == 2 else (rows[0], None)
        return list(self.run.product(x, x_1, matrix, bias, mask, relu))[: len(rows)]

    def channel_mlp(
        self, mean: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        layers = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
        found = channel_mlp(mean, *layers) if self._eager and _float32(mean, *layers) else None
        return super().channel_mlp(mean, *layers) if found is None else found

    def channel_mlp_grad(
        self, de: Tensor, hidden: Tensor, fc1_weight: Tensor, fc2_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        given = (de, hidden, fc1_weight, fc2_weight)
        found = channel_mlp_grad(*given) if self._eager and _float32(*given) else None
        return super().channel_mlp_grad(*given) if found is None else found

    def batch_norm(self, x: Tensor, layer: Layer, follows: Layer | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        links = chain_of([layer] if follows is None else [layer, follows])
        found = chain(links, x) if self._eager and _in_kernels(links, x) else None
        if found is None:
            return super().batch_norm(x, layer, follows)
        y, ((_, *saved),) = found
        return y, tuple(saved)

    def batch_norm_grad(
        self,
        rows: Sequence[Tensor],
        x: Tensor,
        layer: Layer,
        follows: Layer | None,
        saved: tuple[Tensor, ...],
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        links = chain_of([layer] if follows is None else [layer, follows])
        fits = self._eager and _in_kernels(links, x)
        found = chain_grad(links, [(x, *saved)], rows) if fits else None
        if found is None:
            return super().batch_norm_grad(rows, x, layer, follows, saved)
        dx, (gradient,) = found
        return dx, gradient.left, gradient.right

    def chain(self, links: Sequence[Link], x: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        found = chain(links, x) if self._eager and _in_kernels(links, x) else None
        return super().chain(links, x) if found is None else found

    def chain_grad(
        self, links: Sequence[Link], given: Sequence[tuple[Tensor, ...]], rows: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        fits = self._eager and links and _in_kernels(links, given[0][0])
        found = chain_grad(links, given, rows) if fits else None
        return super().chain_grad(links, given, rows) if found is None else found


def _float32(*tensors: Tensor) -> bool:
    return all(x.dtype == torch.float32 for x in tensors)


def _in_kernels(links: Sequence[Link], x: Tensor) -> bool:
    """Whether kernels run all of these layers on x (N, C).

    Torch runs layers of another type or with a missing parameter.  For one image or a wrong width it raises
    the error.
    """
    if x.dtype != torch.float32 or not x.shape[0]:
        return False
    width = x.shape[1]
    for layer, _, from_batch, _ in links:
        if layer.kind not in (LINEAR, BATCH_NORM) or layer.weight is None:
            return False
        tensors = [layer.weight, layer.bias]
        if layer.kind == BATCH_NORM:
            tensors += layer.running_mean, layer.running_var
            alone = x.shape[0] == 1 and from_batch
            if alone or layer.bias is None or (layer.running_mean is None) != (layer.running_var is None):
                return False
        for t in tensors:
            if t is not None and t.dtype != torch.float32:
                return False
            if t is not None and layer.kind == BATCH_NORM and not (t.is_contiguous() and len(t) == width):
                return False
        width = layer.weight.shape[0]
    return True


# ---- stages; each returns None if torch is faster for a product of this size


def channel_mlp(
    mean: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor
) -> tuple[Tensor, Tensor] | None:
    """relu(FC1(g)) and e = FC2(relu(FC1(g)))."""
    hidden, logits = (Empty((mean.shape[0], width)) for width in (len(fc1_weight), len(fc2_weight)))
    first = _product([mean.contiguous()], fc1_weight, [hidden], fc1_bias, relu=True, transposed=True)
    second = _product([hidden], fc2_weight, [logits], fc2_bias, transposed=True)
    if first is None or second is None:
        return None
    h, e = launch_all(mean, [hidden, logits], [first, second])
    return h, e


def channel_mlp_grad(
    de: Tensor, hidden: Tensor, fc1_weight: Tensor, fc2_weight: Tensor
) -> tuple[Tensor, Tensor] | None:
    """dh, before the ReLU, and dg."""
    dh, dg = (Empty((de.shape[0], w.shape[1])) for w in (fc2_weight, fc1_weight))
    first = _product([de.contiguous()], fc2_weight, [dh], mask=hidden.contiguous())
    second = _product([dh], fc1_weight, [dg])
    if first is None or second is None:
        return None
    of_hidden, of_mean = launch_all(de, [dh, dg], [first, second])
    return of_hidden, of_mean


def chain(links: Sequence[Link], x: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]] | None:
    """The output, and of each link its input and the statistics that a norm used, mean and 1 / deviation."""
    works: list[Work] = []
    kept: list[Any] = []
    h: Any = x.contiguous()
    for link in links:
        assert link.layer.weight is not None
        y = Empty((x.shape[0], link.layer.weight.shape[0]))
        kept.append(h)
        if link.layer.kind == BATCH_NORM:
            both = Empty((2, h.shape[1]))  # neighbours in memory
            kept += Row(both, 0), Row(both, 1)
            work: Work | None = _norm(h, link, y, both)
        else:
            work = _product([h], link.layer.weight, [y], link.layer.bias, transposed=True)
        if work is None:
            return None
        works.append(work)
        h = y
    y_made, *found = launch_all(x, [h, *kept], works)
    given: list[tuple[Tensor, ...]] = []
    for link in links:
        own = 3 if link.layer.kind == BATCH_NORM else 1
        given.append(tuple(found[:own]))
        del found[:own]
    return y_made, given


def chain_grad(
    links: Sequence[Link], given: Sequence[tuple[Tensor, ...]], rows: Sequence[Tensor]
) -> tuple[list[Tensor], list[LayerGradient]] | None:
    """dx for each of one or two dy; the layers' gradients for the last dy, last layer first.

    The two gradients of a norm lie side by side in memory.
    """
    works: list[Work] = []
    pairs: list[Any] = []
    dys: list[Any] = [v.contiguous() for v in rows]
    for link, (x, *saved) in zip(reversed(links), reversed(given), strict=True):
        assert link.layer.weight is not None
        dxs = [Empty(tuple(x.shape)) for _ in rows]
        if link.layer.kind == BATCH_NORM:
            both = Empty((2, x.shape[1]))
            pairs += Row(both, 0), Row(both, 1)
            work: Work | None = _norm_grad(dys, x.contiguous(), link, saved, dxs, both)
        else:
            pairs += dys[-1], x
            work = _product(dys, link.layer.weight, dxs)
        if work is None:
            return None
        works.append(work)
        dys = [*dxs]
    found = launch_all(rows[0], [*dys, *pairs], works)
    dx, factors = found[: len(rows)], iter(found[len(rows) :])
    gradients: list[LayerGradient] = []
    for layer, *_ in reversed(links):
        product = layer.kind == LINEAR
        gradients.append(LayerGradient(layer.weight, layer.bias, next(factors), next(factors), product))
    return dx, gradients


@operator
def product(
    x: Tensor, x_1: Tensor | None, matrix: Tensor, bias: Tensor | None, mask: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    """x w + bias for one or two x (M, K) and a matrix w (K, N), with a ReLU, or 0 where mask <= 0."""
    m, n = x.shape[0], matrix.shape[1]
    _check(x, matrix.shape[0], matrix, bias)
    out = [Empty((m, n)), Empty((0 if x_1 is None else m, n))]
    if thread.faked or m * n == 0:
        return tuple(launch_all(x, out, []))  # type: ignore[return-value]
    rows = [x.contiguous()] if x_1 is None else [x.contiguous(), x_1.contiguous()]
    mask = None if mask is None else mask.contiguous()
    work = _product(rows, matrix, out[: len(rows)], bias, mask, relu)
    made = launch_all(x, out, [] if work is None else [work])
    if work is None:
        with full_precision(x):
            for v, y in zip(rows, made, strict=False):
                y.copy_(TORCH.product([v], matrix, bias, mask, relu)[0])
    return tuple(made)  # type: ignore[return-value]


def _check(x: Tensor | Empty, inner: int, matrix: Tensor, bias: Tensor | None) -> None:
    if x.shape[1] != inner:
        raise RuntimeError(f"a layer takes {inner} features; got {x.shape[1]} in shape {tuple(x.shape)}")
    device = x.device if isinstance(x, Tensor) else matrix.device
    if matrix.device != device or (bias is not None and bias.device != device):
        raise RuntimeError(
            f"a layer's parameters must be on its input's device, {device}; got {matrix.device}"
        )


# ---- each function returns one launch, for dense rows


def _product(
    rows: Rows,
    matrix: Tensor,
    out: Sequence[Empty],
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = False,
    transposed: bool = False,
) -> Work | None:
    """out = rows w + bias for one or two rows (M, K) and a matrix w (K, N), given as (N, K) if transposed."""
    shape, strides = (x[::-1] if transposed else x for x in (matrix.shape, matrix.stride()))
    _check(rows[0], shape[0], matrix, bias)
    (m, k), n, count = rows[0].shape, shape[1], len(rows)
    # Split-k needs a barrier that orders global stores; AMD's does not.
    may_split = torch.version.hip is None and matrix.device.type in ("cuda", "cpu", "meta")
    # A recording needs a kernel: it cannot hold torch's product.
    cut = plan.product(count * m, n, k, bias is not None, may_split, thread.recorder is not None)
    if cut is None:
        return None
    if (k - 1) * strides[0] + (n - 1) * strides[1] >= 2**31:
        matrix, strides = matrix.contiguous(), (1, k) if transposed else (n, 1)
    dot = plan.dot_options(matrix.device.type, torch.version.hip is not None)
    tiles = count * plan.blocks(m, cut.block_m) * plan.blocks(n, cut.block_n)
    partials = counters = None
    if cut.split > 1:
        partials, counters = Empty((count, cut.split, m, n)), Zeros(tiles)
    arguments = (
        *_two(rows), matrix, None if bias is None else bias.contiguous(), mask, *_two(out), partials,
        counters, m, n, k, k, 1, *strides,
    )  # fmt: skip
    return Work(product_kernels.product_kernel, tiles * cut.split, arguments, {
        "R": count, "RELU": relu, "SPLIT": cut.split,
        "STEPS": plan.blocks(plan.blocks(k, cut.split), cut.block_k),
        "BLOCK_M": cut.block_m, "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k,
        "STAGES": cut.stages, "num_warps": cut.num_warps, **dot, **FP_FUSION,
    })  # fmt: skip


def _norm(x: Tensor | Empty, link: Link, y: Empty, statistics: Empty) -> Work:
    """act(norm(x)), and the mean and 1 / deviation that were used.  Running statistics are updated."""
    layer, follows, from_batch, moves = link
    act, alpha = _activation(follows)
    batch, channels = x.shape
    cut = plan.batch_norm(channels)
    momentum = _FIXED
    if moves and layer.tracked is not None:
        momentum = _CUMULATIVE if layer.momentum is None else _SETTLING if layer.settling else _FIXED
    running = (layer.running_mean, layer.running_var) if moves or not from_batch else (None, None)
    arguments = (
        x, layer.weight, layer.bias, *running, layer.tracked if moves else None,
        None if momentum == _FIXED else Zeros(1), y, Row(statistics, 0), Row(statistics, 1),
        float(layer.momentum or 0.0), float(layer.eps), alpha, batch,
    )  # fmt: skip
    return Work(batch_norm_kernels.batch_norm_kernel, plan.blocks(channels, cut.block_c), arguments, {
        "C": channels, "TRAINING": from_batch, "MOMENTUM": momentum, "ACT": act,
        "BLOCK_N": cut.block_n, "BLOCK_C": cut.block_c, "num_warps": cut.num_warps, **FP_FUSION,
    })  # fmt: skip


def _norm_grad(
    rows: Rows,
    x: Tensor,
    link: Link,
    saved: Sequence[Tensor],
    found: Sequence[Empty],
    grads: Empty,
) -> Work:
    """dx for each of one or two dy; d gamma and d beta for the last dy."""
    layer, follows, from_batch, _ = link
    act, alpha = _activation(follows)
    batch, channels = x.shape
    cut = plan.batch_norm(channels)
    arguments = (
        *_two(rows), x, layer.weight, layer.bias, *saved[:2], *_two(found), Row(grads, 0), Row(grads, 1),
        alpha, batch,
    )  # fmt: skip
    programs = len(rows) * plan.blocks(channels, cut.block_c)
    return Work(batch_norm_kernels.batch_norm_grad_kernel, programs, arguments, {
        "C": channels, "R": len(rows), "TRAINING": from_batch, "ACT": act,
        "BLOCK_N": cut.block_n, "BLOCK_C": cut.block_c, "num_warps": cut.num_warps, **FP_FUSION,
    })  # fmt: skip


def _activation(follows: Layer | None) -> tuple[int, float]:
    """The kernel's constant for the activation, and its alpha."""
    if follows is None:
        return _NONE, 1.0
    return _ELU if follows.kind == ELU else _RELU, float(follows.alpha)


def _two(tensors: Rows) -> tuple[Tensor | Empty | None, ...]:
    return (*tensors, None, None)[:2]
