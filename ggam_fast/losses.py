"""GGAMLoss: the cross entropy plus the weighted guidance loss."""

import torch
from torch import Tensor, nn

from . import checks
from .base import GGAMOutput
from .entropy import cross_entropy
from .precision import compute_dtype

if checks.TRITON_AVAILABLE:
    from . import recorded
else:
    recorded = None  # type: ignore[assignment]


class GGAMLoss(nn.Module):
    """CE(logits, target) + guidance_weight * L_GGAM.

    Args:
        guidance_weight: lambda >= 0. Versions of the authors' README use 0.2 to 3, with RELEASE's
            softmax(beta). The scale of L depends on `cam_norm` and on C, so choose a weight for yours.
        label_smoothing: as in `torch.nn.CrossEntropyLoss`, in [0, 1].
        ignore_index: images with this label have no loss and do not count in the mean. Give the head the
            same value.

    The input is the head's `GGAMOutput`, or plain logits (N, K) from a call without target. Plain logits
    give the cross entropy alone. `target` is int64 (N,) or float probabilities (N, K). The result is a
    scalar: the mean cross entropy of the batch (0 for an empty one) plus the weighted guidance loss, a mean
    or a sum (`guidance_reduction` of the head). It is float32 for half-precision logits.
    """

    def __init__(
        self,
        guidance_weight: float = 0.1,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index = checks.label("ignore_index", ignore_index)
        self.guidance_weight, self.label_smoothing = checks.loss_weights(guidance_weight, label_smoothing)

    def forward(self, out: GGAMOutput | Tensor, target: Tensor) -> Tensor:
        logits = out.logits if isinstance(out, GGAMOutput) else out
        checks.matrix("out", logits, "of logits (N, K), or a GGAMOutput")
        guidance = out.guidance_loss if isinstance(out, GGAMOutput) else None
        if recorded is not None and not torch.compiler.is_compiling():
            replayed = recorded.loss(
                logits, guidance, target, self.guidance_weight, self.label_smoothing, self.ignore_index
            )
            if replayed is not None:
                return replayed
        logits = logits.to(compute_dtype(logits))
        target = checks.target(target, logits.shape[0], logits.shape[1], self.ignore_index, logits.device)
        loss = cross_entropy(logits, target, self.label_smoothing, self.ignore_index)
        return loss if guidance is None else loss + self.guidance_weight * guidance

    def extra_repr(self) -> str:
        return f"guidance_weight={self.guidance_weight}, label_smoothing={self.label_smoothing}"
