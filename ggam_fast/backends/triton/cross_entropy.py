"""The cross entropy of each image, and the seeds of both gradients; the whole loss of the drop-in form."""

import torch
from torch import Tensor

from ggam_fast.backends.torch import Entropy

from .launch import FP_FUSION, contiguous, empty, launch, per_image, plan, runs, small
from .register import KernelBackend, operator

from ggam_fast.kernels import cross_entropy as cross_entropy_kernels  # isort: skip

# Check labels in the kernel even if Triton's own debug setting is off.
_ASSERTS = {"debug": True}


class CrossEntropy(KernelBackend):
    """The stages of this file for float32; torch's for other types."""

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


def _in_kernel(logits: Tensor, target: Tensor) -> bool:
    soft = target.is_floating_point() and target.dtype != torch.float32
    return logits.dtype == torch.float32 and not soft


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
