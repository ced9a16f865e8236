"""Batch norm with what follows it, and the cross entropy with its seeds."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ggam_fast.backends.layer import ELU, Layer

from .launch import launch
from .register import operator
from .shapes import FP_FUSION, empty, pair, per_image, plan, small

from ggam_fast.kernels import batch_norm as batch_norm_kernels  # isort: skip
from ggam_fast.kernels import cross_entropy as cross_entropy_kernels  # isort: skip

_FIXED, _CUMULATIVE, _SETTLING = range(3)
_NONE, _RELU, _ELU = range(3)
# The check of labels, whatever Triton's own setting is.
_ASSERTS = {"debug": True}


def batch_norm(x: Tensor, layer: Layer, follows: Layer | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """act(norm(x)), and the mean and one over the deviation that it was normalised with; running statistics
    move."""
    batch, channels = x.shape
    y = small(batch, channels, x)
    mean, rstd = small(2, channels, x).unbind(0)  # neighbours in memory
    cut = plan.batch_norm(channels)
    moves = layer.moves
    momentum = _FIXED
    if moves and layer.tracked is not None:
        momentum = _CUMULATIVE if layer.momentum is None else _SETTLING if layer.settling else _FIXED
    counter = None
    if momentum != _FIXED:
        counter = torch.zeros((1,), dtype=torch.int32, device=x.device)
    running = (layer.running_mean, layer.running_var) if moves or not layer.from_batch else (None, None)
    launch(
        batch_norm_kernels.batch_norm_kernel, plan.blocks(channels, cut.block_c),
        x.contiguous(), layer.weight, layer.bias, *running, layer.tracked if moves else None, counter,
        y, mean, rstd, float(layer.momentum or 0.0), float(layer.eps), _alpha(follows), batch,
        C=channels, TRAINING=layer.from_batch, MOMENTUM=momentum, ACT=_act(follows),
        BLOCK_N=cut.block_n, BLOCK_C=cut.block_c, num_warps=cut.num_warps, **FP_FUSION,
    )  # fmt: skip
    return y, (mean, rstd)


def batch_norm_grad(
    rows: Sequence[Tensor], x: Tensor, layer: Layer, follows: Layer | None, saved: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """dx of each of one or two dy, and d gamma and d beta of the last one, which are neighbours in memory"""
    batch, channels = x.shape
    found = [small(batch, channels, x) for _ in rows]
    of_parameters = small(2, channels, x)
    dgamma, dbeta = of_parameters.unbind(0)
    cut = plan.batch_norm(channels)
    launch(
        batch_norm_kernels.batch_norm_grad_kernel, len(rows) * plan.blocks(channels, cut.block_c),
        *pair([dy.contiguous() for dy in rows]), x.contiguous(), layer.weight, layer.bias, *saved[:2],
        *pair(found), dgamma, dbeta, _alpha(follows), batch,
        C=channels, R=len(rows), TRAINING=layer.from_batch, ACT=_act(follows),
        BLOCK_N=cut.block_n, BLOCK_C=cut.block_c, num_warps=cut.num_warps, **FP_FUSION,
    )  # fmt: skip
    return found, dgamma, dbeta


def _act(follows: Layer | None) -> int:
    return _NONE if follows is None else _ELU if follows.kind == ELU else _RELU


def _alpha(follows: Layer | None) -> float:
    return 1.0 if follows is None else float(follows.alpha)


@operator
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    smoothing: float,
    predicted: bool,
    ignores: bool,
    ignore_index: int,
    with_loss: bool,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(losses, share, d score, d loss), see `Entropy`; the first and the last are empty without a loss"""
    batch, classes = logits.shape
    score, share = small(batch, classes, logits), per_image(batch, logits)
    losses = per_image(batch if with_loss else 0, logits)
    grad = small(batch if with_loss else 0, classes, logits)
    yield losses, share, score, grad
    given = (losses, grad) if with_loss else (None, None)
    _launch(
        logits, target, given[0], given[1], score, share, None, None, smoothing, 0.0, predicted, ignores,
        ignore_index,
    )  # fmt: skip


def whole_loss(
    logits: Tensor,
    target: Tensor,
    guidance: Tensor | None,
    smoothing: float,
    weight: float,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """The mean of the cross entropies plus the weighted guidance (), and d loss / d logits"""
    batch, classes = logits.shape
    total, grad = empty((), logits), small(batch, classes, logits)
    losses = per_image(batch, logits)
    _launch(
        logits, target, losses, grad, None, None, guidance, total, smoothing, weight, False,
        ignore_index is not None, ignore_index or 0,
    )  # fmt: skip
    return total, grad


def whole_loss_grad(
    scale: Tensor, grad: Tensor, weight: float, with_guidance: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the logits and of the guidance, for a gradient `scale` of the loss"""
    of_logits = empty(grad.shape, grad)
    of_guidance = empty((), grad) if with_guidance else None
    launch(
        cross_entropy_kernels.cross_entropy_grad_kernel, plan.blocks(grad.numel(), plan.SCALE_BLOCK),
        scale, grad, of_logits, of_guidance, weight, grad.numel(),
        BLOCK=plan.SCALE_BLOCK, num_warps=4, **FP_FUSION,
    )  # fmt: skip
    return of_logits, of_guidance


def _launch(
    logits: Tensor,
    target: Tensor,
    losses: Tensor | None,
    grad: Tensor | None,
    score: Tensor | None,
    share: Tensor | None,
    guidance: Tensor | None,
    total: Tensor | None,
    smoothing: float,
    weight: float,
    predicted: bool,
    ignores: bool,
    ignore_index: int,
) -> None:
    batch, classes = logits.shape
    if not batch:
        return
    block, num_warps = plan.cross_entropy(classes)
    hard = not target.is_floating_point()
    counter = None if total is None else torch.zeros((1,), dtype=torch.int32, device=logits.device)
    launch(
        cross_entropy_kernels.cross_entropy_kernel, batch,
        logits.contiguous(), target.contiguous() if hard else target.to(torch.float32).contiguous(), losses,
        grad, score, share, counter, guidance, total, ignore_index, smoothing, weight, batch,
        K=classes, HARD=hard, IGNORE=ignores and hard, PREDICTED=predicted,
        BLOCK_K=block, num_warps=num_warps, **_ASSERTS, **FP_FUSION,
    )  # fmt: skip
