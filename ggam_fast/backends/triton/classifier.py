"""Batch norm with the activation after it, and the cross entropy with its gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ggam_fast.backends.torch import Entropy
from ggam_fast.layer import ELU, Layer

from .launch import FP_FUSION, contiguous, empty, launch, pair, per_image, plan, runs, small
from .register import KernelBackend, operator

from ggam_fast.kernels import batch_norm as batch_norm_kernels  # isort: skip
from ggam_fast.kernels import cross_entropy as cross_entropy_kernels  # isort: skip

_FIXED, _CUMULATIVE, _SETTLING = range(3)
_NONE, _RELU, _ELU = range(3)
# Check labels in the kernel even if Triton's own debug setting is off.
_ASSERTS = {"debug": True}


class Classifier(KernelBackend):
    """The stages of this file for float32; torch's for other types.

    Batch norm is not an operator: an operator would hide that it changes the running statistics.
    """

    def batch_norm(self, x: Tensor, layer: Layer, follows: Layer | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        if _in_torch(x, layer):
            return super().batch_norm(x, layer, follows)
        return batch_norm(x, layer, follows)

    def batch_norm_grad(
        self,
        rows: Sequence[Tensor],
        x: Tensor,
        layer: Layer,
        follows: Layer | None,
        saved: tuple[Tensor, ...],
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        if _in_torch(x, layer):
            return super().batch_norm_grad(rows, x, layer, follows, saved)
        found, dgamma, dbeta = batch_norm_grad(rows, x, layer, follows, saved)
        return found, dgamma if layer.weight is not None else None, dbeta

    def cross_entropy(
        self, logits: Tensor, target: Tensor, smoothing: float, cam_class: str, ignore_index: int | None
    ) -> Entropy:
        if not _in_kernel(logits, target):
            return super().cross_entropy(logits, target, smoothing, cam_class, ignore_index)
        losses, grad, score, share, _ = self.run.cross_entropy(
            logits, target, None, smoothing, 0.0, cam_class == "predicted", ignore_index is not None,
            ignore_index or 0, True, True, False,
        )  # fmt: skip
        return Entropy(losses, share, score, grad)

    def class_scores(
        self, logits: Tensor, target: Tensor, cam_class: str, ignore_index: int | None
    ) -> tuple[Tensor, Tensor | None]:
        if not _in_kernel(logits, target):
            return super().class_scores(logits, target, cam_class, ignore_index)
        _, _, score, share, _ = self.run.cross_entropy(
            logits, target, None, 0.0, 0.0, cam_class == "predicted", ignore_index is not None,
            ignore_index or 0, False, True, False,
        )  # fmt: skip
        return score, share


def _in_torch(x: Tensor, layer: Layer) -> bool:
    """Whether torch does the batch norm.

    It does so in compiled code and under torch.func, and if a parameter is missing or has another type.  For
    one image or a wrong width torch raises the error.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (x.shape[0] == 1 and layer.from_batch)
        or layer.weight is None
        or layer.bias is None
        or (layer.running_mean is None) != (layer.running_var is None)
    ):
        return True
    for t in (x, layer.weight, layer.bias, layer.running_mean, layer.running_var):
        if t is not None and not (
            t.dtype == torch.float32 and t.is_contiguous() and t.shape[-1] == x.shape[1]
        ):
            return True
    return False


def _in_kernel(logits: Tensor, target: Tensor) -> bool:
    soft = target.is_floating_point() and target.dtype != torch.float32
    return logits.dtype == torch.float32 and not soft


def batch_norm(x: Tensor, layer: Layer, follows: Layer | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """act(norm(x)), and the mean and 1 / deviation that were used.  Running statistics are updated."""
    act, alpha = _activation(follows)
    from_batch, moves = layer.from_batch, layer.moves
    batch, channels = x.shape
    y = small(batch, channels, x)
    mean, rstd = small(2, channels, x).unbind(0)  # neighbours in memory
    cut = plan.batch_norm(channels)
    momentum = _FIXED
    if moves and layer.tracked is not None:
        momentum = _CUMULATIVE if layer.momentum is None else _SETTLING if layer.settling else _FIXED
    counter = None
    if momentum != _FIXED:
        counter = torch.zeros((1,), dtype=torch.int32, device=x.device)
    running = (layer.running_mean, layer.running_var) if moves or not from_batch else (None, None)
    launch(
        batch_norm_kernels.batch_norm_kernel, plan.blocks(channels, cut.block_c),
        x.contiguous(), layer.weight, layer.bias, *running, layer.tracked if moves else None, counter,
        y, mean, rstd, float(layer.momentum or 0.0), float(layer.eps), alpha, batch,
        C=channels, TRAINING=from_batch, MOMENTUM=momentum, ACT=act,
        BLOCK_N=cut.block_n, BLOCK_C=cut.block_c, num_warps=cut.num_warps, **FP_FUSION,
    )  # fmt: skip
    return y, (mean, rstd)


def batch_norm_grad(
    rows: Sequence[Tensor],
    x: Tensor,
    layer: Layer,
    follows: Layer | None,
    saved: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """dx for each of one or two dy; d gamma and d beta for the last dy, side by side in memory."""
    act, alpha = _activation(follows)
    from_batch = layer.from_batch
    batch, channels = x.shape
    found: list[Tensor] = []
    for _ in rows:
        found.append(small(batch, channels, x))
    dgamma, dbeta = small(2, channels, x).unbind(0)
    cut = plan.batch_norm(channels)
    launch(
        batch_norm_kernels.batch_norm_grad_kernel, len(rows) * plan.blocks(channels, cut.block_c),
        *pair(rows), x.contiguous(), layer.weight, layer.bias, *saved[:2], *pair(found), dgamma, dbeta, alpha,
        batch, C=channels, R=len(rows), TRAINING=from_batch, ACT=act,
        BLOCK_N=cut.block_n, BLOCK_C=cut.block_c, num_warps=cut.num_warps, **FP_FUSION,
    )  # fmt: skip
    return found, dgamma, dbeta


def _activation(follows: Layer | None) -> tuple[int, float]:
    """The kernel's constant for the activation, and its alpha."""
    if follows is None:
        return _NONE, 1.0
    return _ELU if follows.kind == ELU else _RELU, float(follows.alpha)


@operator
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    guidance: Tensor | None,
    smoothing: float,
    weight: float,
    predicted: bool,
    ignores: bool,
    ignore_index: int,
    with_loss: bool,
    with_score: bool,
    with_total: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(losses, d loss, d score, share, total), see `Entropy`; total is mean loss plus weighted guidance.

    Results that are not requested are empty.
    """
    batch, classes = logits.shape
    block, num_warps = plan.cross_entropy(classes)
    hard = not target.is_floating_point()
    n, m = batch if with_loss else 0, batch if with_score else 0
    losses, grad = per_image(n, logits), small(n, classes, logits)
    score, share = small(m, classes, logits), per_image(m, logits)
    total = empty(() if with_total else (0,), logits)
    if runs(batch):
        counter = None
        if with_total:
            counter = torch.zeros((1,), dtype=torch.int32, device=logits.device)
        asked = (losses if with_loss else None, grad if with_loss else None, score if with_score else None)
        launch(
            cross_entropy_kernels.cross_entropy_kernel, batch,
            contiguous(logits), contiguous(target if hard else target.to(torch.float32)), *asked,
            share if with_score else None, counter, guidance, total if with_total else None, ignore_index,
            smoothing, weight, batch, K=classes, HARD=hard, IGNORE=ignores and hard, PREDICTED=predicted,
            BLOCK_K=block, num_warps=num_warps, **_ASSERTS, **FP_FUSION,
        )  # fmt: skip
    return losses, grad, score, share, total


def whole_loss(
    logits: Tensor,
    target: Tensor,
    guidance: Tensor | None,
    smoothing: float,
    weight: float,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    """The mean of the cross entropies plus the weighted guidance, (), and d loss / d logits."""
    _, grad, _, _, total = cross_entropy(
        logits, target, guidance, smoothing, weight, False, ignore_index is not None, ignore_index or 0, True,
        False, True,
    )  # fmt: skip
    return total, grad


def whole_loss_grad(
    scale: Tensor, grad: Tensor, weight: float, with_guidance: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the logits and of the guidance; `scale` is the gradient of the loss."""
    of_logits = empty(grad.shape, grad)
    of_guidance = empty((), grad) if with_guidance else None
    launch(
        cross_entropy_kernels.cross_entropy_grad_kernel, plan.blocks(grad.numel(), plan.SCALE_BLOCK),
        scale, grad, of_logits, of_guidance, weight, grad.numel(),
        BLOCK=plan.SCALE_BLOCK, num_warps=4, **FP_FUSION,
    )  # fmt: skip
    return of_logits, of_guidance
