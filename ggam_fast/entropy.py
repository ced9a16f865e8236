"""The cross entropy and how a loss is reduced over a batch, in torch operations."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int | None = None
) -> Tensor:
    """Mean over the images that count, 0 where there is none; `target` as `checks.target` returns it."""
    if target.is_floating_point():
        target = target.to(logits.dtype)
    elif ignore_index is not None:
        counts = target != ignore_index
        target = target.masked_fill(~counts, 0)
        # A loss of a constant: not even what is not finite in an ignored image's logits gets through.
        losses = F.cross_entropy(
            torch.where(counts.unsqueeze(-1), logits, 0.0), target,
            reduction="none", label_smoothing=label_smoothing,
        )  # fmt: skip
        return (losses * counts).sum() / counts.sum().clamp(min=1)
    total = F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)
    return total / max(logits.shape[0], 1)


def reduce_batch(per_image: Tensor, reduction: str, share: Tensor | None = None) -> Tensor:
    """Sum, or mean over the batch; 0 for an empty batch.  With `share` (see `Entropy`) of the images that
    count."""
    if share is not None:
        counted = torch.where(share > 0, per_image, 0.0)
        return counted.sum() if reduction == "sum" else (counted * share).sum()
    return per_image.sum() if reduction == "sum" or not per_image.shape[0] else per_image.mean()
