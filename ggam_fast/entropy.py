"""The cross entropy, and reductions of a loss over a batch, in torch operations."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The cross entropy of each image ("none"), or its mean over the images that are not ignored ("mean").

    The mean of no image is 0.  `checks.target` must have checked `target`.  With class weights (K,) the mean
    is torch's: over the labels' weights, and over the batch for probabilities.
    """
    counts = None
    if target.is_floating_point():
        target = target.to(logits.dtype)
    elif ignore_index is not None:
        counts = target != ignore_index
        target = target.masked_fill(~counts, 0)
        # An ignored image gets constant logits, so infinities and NaN in its own cannot reach the mean.
        logits = torch.where(counts.unsqueeze(-1), logits, 0.0)
    if reduction == "mean" and counts is None and (weight is None or target.is_floating_point()):
        total = F.cross_entropy(logits, target, weight, reduction="sum", label_smoothing=label_smoothing)
        return total / max(logits.shape[0], 1)
    losses = F.cross_entropy(logits, target, weight, reduction="none", label_smoothing=label_smoothing)
    if counts is not None:
        losses = losses * counts
    if reduction == "none":
        return losses
    if weight is None:
        assert counts is not None
        return losses.sum() / counts.sum().clamp(min=1)
    shares = weight[target] if counts is None else weight[target] * counts
    share = shares.sum()
    return losses.sum() / torch.where(share > 0, share, 1.0)


def reduce_batch(per_image: Tensor, reduction: str, share: Tensor | None = None) -> Tensor:
    """Sum or mean over the batch, 0 for an empty batch; "none" keeps the losses of the images (N,).

    With `share` (N,), the weights in `Entropy.share`, ignored images are left out, or have a loss of 0.
    """
    if reduction == "none":
        return per_image if share is None else torch.where(share > 0, per_image, 0.0)
    if share is not None:
        counted = torch.where(share > 0, per_image, 0.0)
        return counted.sum() if reduction == "sum" else (counted * share).sum()
    return per_image.sum() if reduction == "sum" or not per_image.shape[0] else per_image.mean()
