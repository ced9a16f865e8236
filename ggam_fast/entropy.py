"""The cross entropy, and reductions of a loss over a batch, in torch operations."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int | None = None
) -> Tensor:
    """Mean cross entropy of the images that are not ignored, 0 if there are none.

    `checks.target` must have checked `target`.
    """
    if target.is_floating_point():
        target = target.to(logits.dtype)
    elif ignore_index is not None:
        counts = target != ignore_index
        target = target.masked_fill(~counts, 0)
        # An ignored image gets constant logits, so infinities and NaN in its own cannot reach the mean.
        losses = F.cross_entropy(
            torch.where(counts.unsqueeze(-1), logits, 0.0), target,
            reduction="none", label_smoothing=label_smoothing,
        )  # fmt: skip
        return (losses * counts).sum() / counts.sum().clamp(min=1)
    total = F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)
    return total / max(logits.shape[0], 1)


def reduce_batch(per_image: Tensor, reduction: str, share: Tensor | None = None) -> Tensor:
    """Sum or mean over the batch; 0 for an empty batch.

    With `share` (N,), the weights in `Entropy.share`, ignored images are left out.
    """
    if share is not None:
        counted = torch.where(share > 0, per_image, 0.0)
        return counted.sum() if reduction == "sum" else (counted * share).sum()
    return per_image.sum() if reduction == "sum" or not per_image.shape[0] else per_image.mean()
