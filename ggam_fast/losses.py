"""GGAMLoss: the cross entropy and the guidance loss of `guidance`, weighted."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .base import GGAMOutput


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the batch, 0 for an empty one; `target` as `checks.target` returns it."""
    if target.is_floating_point():
        target = target.to(logits.dtype)
    total = F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)
    return total / max(logits.shape[0], 1)


def cross_entropy_grad(logits: Tensor, q: Tensor, label_smoothing: float, hard: bool) -> Tensor:
    """d cross_entropy / d logits (N, K): (p sum q - q) / N for p = softmax(logits) and the target's
    probabilities q, smoothed; `hard` says that they sum to one."""
    if label_smoothing:
        q = q * (1.0 - label_smoothing) + label_smoothing / logits.shape[1]
    p = torch.softmax(logits, -1)
    return (p - q if hard else p * q.sum(-1, keepdim=True) - q) / max(logits.shape[0], 1)


def loss_weights(guidance_weight: float, label_smoothing: float) -> tuple[float, float]:
    """Both in their range, else raise."""
    if not 0.0 <= checks.number("guidance_weight", guidance_weight) < float("inf"):
        raise ValueError(f"guidance_weight must be finite and not negative; got {guidance_weight!r}")
    if not 0.0 <= checks.number("label_smoothing", label_smoothing) <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing!r}")
    return guidance_weight, label_smoothing


def reduce_batch(per_image: Tensor, reduction: str) -> Tensor:
    """Sum, or mean over the batch; 0 for an empty batch."""
    return per_image.sum() if reduction == "sum" or not per_image.shape[0] else per_image.mean()


class GGAMLoss(nn.Module):
    """CE(logits, target) + guidance_weight * L_GGAM.

    Args:
        guidance_weight: lambda >= 0. The authors' README history spans 0.2 to 3 with RELEASE's
            softmax(beta); the scale of L depends on `cam_norm` and on C, so choose it for yours.
        label_smoothing: as in `torch.nn.CrossEntropyLoss`, in [0, 1].

    Takes the head's `GGAMOutput`, or plain logits (N, K) of a forward without target, for which it is
    the cross entropy alone; `target` is int64 (N,) or float probabilities (N, K). Returns a scalar: the
    cross entropy's mean over the batch (0 for an empty one) and the head's guidance loss, a mean or a sum
    (`guidance_reduction`), in float32 for half-precision logits.
    """

    def __init__(self, guidance_weight: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.guidance_weight, self.label_smoothing = loss_weights(guidance_weight, label_smoothing)

    def forward(self, out: GGAMOutput | Tensor, target: Tensor) -> Tensor:
        logits = out.logits if isinstance(out, GGAMOutput) else out
        checks.matrix("out", logits, "of logits (N, K), or a GGAMOutput")
        logits = logits.to(checks.compute_dtype(logits))
        target = checks.target(target, logits.shape[0], logits.shape[1])
        loss = cross_entropy(logits, target, self.label_smoothing)
        if isinstance(out, Tensor):
            return loss
        return loss + self.guidance_weight * out.guidance_loss

    def extra_repr(self) -> str:
        return f"guidance_weight={self.guidance_weight}, label_smoothing={self.label_smoothing}"
