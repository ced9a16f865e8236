"""GGAMLoss: the cross entropy plus the weighted guidance loss."""

import warnings
from typing import Literal, NamedTuple

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


class GGAMLossParts(NamedTuple):
    """What `GGAMLoss(return_parts=True)` returns."""

    loss: Tensor
    """() cross_entropy + guidance_weight * guidance; (N,) for `reduction="none"`"""
    cross_entropy: Tensor
    """() its mean over the batch; (N,) for `reduction="none"`"""
    guidance: Tensor
    """() the head's guidance loss, without its weight; 0 for plain logits"""


class GGAMLoss(nn.Module):
    """CE(logits, target) + guidance_weight * L_GGAM.

    Args:
        guidance_weight: lambda >= 0. Versions of the authors' README use 0.2 to 3, with RELEASE's
            softmax(beta). The scale of L depends on `cam_norm` and on C, so choose a weight for yours.
        label_smoothing: as in `torch.nn.CrossEntropyLoss`, in [0, 1].
        ignore_index: images with this label have no loss and do not count in the mean. Give the head the
            same value.
        weight: weight of each class, float (K,), for the cross entropy alone, as in
            `torch.nn.CrossEntropyLoss`. The mean of int64 targets is over the labels' weights. The state
            dict holds it.
        reduction: "mean", or "none" for the cross entropy of each image (N,). "none" needs
            guidance_weight=0, because the head's guidance is one number for the batch.
        return_parts: True returns a `GGAMLossParts`.
        strict: True raises an error where False warns, see below.

    The input is the head's `GGAMOutput`, or plain logits (N, K) from a call without target. Plain logits
    give the cross entropy alone. `target` is int64 (N,) or float probabilities (N, K). The result is a
    scalar: the mean cross entropy of the batch (0 for an empty one) plus the weighted guidance loss, a mean
    or a sum (`guidance_reduction` of the head). It is float32 for half-precision logits.

    Plain logits that carry a gradient have no guidance to train with. With guidance_weight > 0 the loss
    then gives one UserWarning (compiled code gives it when it is traced), or raises TypeError if `strict`.
    """

    _warned = False

    def __init__(
        self,
        guidance_weight: float = 0.1,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
        return_parts: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_index = checks.label("ignore_index", ignore_index)
        self.guidance_weight, self.label_smoothing = checks.loss_weights(guidance_weight, label_smoothing)
        self.weight: Tensor | None
        self.register_buffer("weight", checks.class_weights(weight))
        self.reduction = checks.one_of("reduction", reduction, ("mean", "none"))
        if self.reduction == "none" and self.guidance_weight:
            raise ValueError(
                'reduction="none" needs guidance_weight=0, as the head\'s guidance is one number for the '
                f"batch; got guidance_weight={guidance_weight!r}. For the guidance of each image call "
                'functional.guidance_loss(out.channel_attention, out.cam_weights, reduction="none")'
            )
        self.return_parts, self.strict = bool(return_parts), bool(strict)

    def forward(self, out: GGAMOutput | Tensor, target: Tensor) -> Tensor | GGAMLossParts:
        logits = out.logits if isinstance(out, GGAMOutput) else out
        checks.matrix("out", logits, "of logits (N, K), or a GGAMOutput")
        guidance = out.guidance_loss if isinstance(out, GGAMOutput) else None
        if guidance is None and self.guidance_weight and logits.requires_grad:
            self._without_guidance()
        plain = self.weight is None and self.reduction == "mean" and not self.return_parts
        if plain and recorded is not None and not torch.compiler.is_compiling():
            replayed = recorded.loss(
                logits, guidance, target, self.guidance_weight, self.label_smoothing, self.ignore_index
            )
            if replayed is not None:
                return replayed
        logits = logits.to(compute_dtype(logits))
        target = checks.target(target, logits.shape[0], logits.shape[1], self.ignore_index, logits.device)
        weight = self.weight
        if weight is not None:
            weight = checks.small("weight", weight, (logits.shape[1],), "(K,)", logits.device).to(
                logits.dtype
            )
        entropy = cross_entropy(
            logits, target, self.label_smoothing, self.ignore_index, weight, self.reduction
        )
        loss = entropy
        if guidance is not None and self.reduction == "mean":
            loss = entropy + self.guidance_weight * guidance
        if not self.return_parts:
            return loss
        return GGAMLossParts(loss, entropy, logits.new_zeros(()) if guidance is None else guidance)

    def _without_guidance(self) -> None:
        message = (
            f"GGAMLoss(guidance_weight={self.guidance_weight:g}) got plain logits, so nothing guides the "
            "attention. Give the head the target too: loss_fn(model(images, target), target). For the cross "
            "entropy alone use guidance_weight=0"
        )
        if self.strict:
            raise TypeError(message)
        if torch.compiler.is_compiling():
            _warn(message)
        elif not self._warned:
            self._warned = True
            _warn(message)

    def extra_repr(self) -> str:
        return f"guidance_weight={self.guidance_weight}, label_smoothing={self.label_smoothing}"


@torch.compiler.assume_constant_result
def _warn(message: str) -> None:
    """A warning while the compiler traces, too."""
    warnings.warn(message, UserWarning, stacklevel=6)  # the line that calls the loss
