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
    """() or (N,) the head's guidance loss, without its weight; 0 for plain logits"""

    @property
    def positions(self) -> Tensor:
        """() 0: the head has no `position_guidance`"""
        return torch.zeros_like(self.guidance)


class GGAMPositionLossParts(NamedTuple):
    """What `GGAMLoss(return_parts=True)` returns for a head with `position_guidance`."""

    loss: Tensor
    """() cross_entropy + guidance_weight * guidance + position_weight * positions"""
    cross_entropy: Tensor
    """() as in `GGAMLossParts`"""
    guidance: Tensor
    """() as in `GGAMLossParts`"""
    positions: Tensor
    """() the head's position loss, without its weight"""


class GGAMLoss(nn.Module):
    """CE(logits, target) + guidance_weight * L_GGAM + position_weight * L of positions.

    Args:
        guidance_weight: lambda >= 0. The scale of L depends on `cam_norm`, `divergence` and C. The default
            suits the head's own: for a fresh head of 2048 channels, lambda L has one order with the cross
            entropy, and so has its gradient on `fc2`. Two distributions ("standardized_softmax" with
            "reverse") need about 0.1. presets.RELEASE trains with 1.0, versions of the authors' README with
            0.2 to 3.
        label_smoothing: as in `torch.nn.CrossEntropyLoss`, in [0, 1].
        ignore_index: images with this label have no loss and do not count in the mean. Give the head the
            same value.
        weight: weight of each class, float (K,), for the cross entropy alone, as in
            `torch.nn.CrossEntropyLoss`. The mean of int64 targets is over the labels' weights. The state
            dict holds it.
        reduction: "mean", or "none" for the loss of each image (N,). With a guidance or position loss "none"
            needs a head with `guidance_reduction="none"`. Other heads give one number for the batch.
        return_parts: True returns a `GGAMLossParts`, or for a head with `position_guidance` a
            `GGAMPositionLossParts`, which has a fourth part.
        strict: True raises an error where False warns, see below.
        position_weight: weight >= 0 of the position loss of a head with `position_guidance`. None is 1 for
            such a head. A weight above 0 is an error for the output of any other head.

    The input is the head's `GGAMOutput`, or plain logits (N, K) from a call without target. Plain logits
    give the cross entropy alone. `target` is int64 (N,) or float probabilities (N, K). The result is a
    scalar: the mean cross entropy of the batch (0 for an empty one) plus the weighted guidance loss, a mean
    or a sum (`guidance_reduction` of the head), plus the weighted position loss, a mean. It is float32 for
    half-precision logits.

    Plain logits that carry a gradient have no guidance to train with. With guidance_weight > 0 the loss
    then gives one UserWarning (compiled code gives it when it is traced), or raises TypeError if `strict`.
    """

    _warned = False

    def __init__(
        self,
        guidance_weight: float = 1e-3,
        label_smoothing: float = 0.0,
        ignore_index: int | None = None,
        *,
        weight: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
        return_parts: bool = False,
        strict: bool = False,
        position_weight: float | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index = checks.label("ignore_index", ignore_index)
        self.guidance_weight, self.label_smoothing = checks.loss_weights(guidance_weight, label_smoothing)
        self.position_weight = checks.position_weight(position_weight)
        self.weight: Tensor | None
        self.register_buffer("weight", checks.class_weights(weight))
        self.reduction = checks.one_of("reduction", reduction, ("mean", "none"))
        self.return_parts, self.strict = bool(return_parts), bool(strict)

    def forward(
        self, out: GGAMOutput | Tensor, target: Tensor
    ) -> Tensor | GGAMLossParts | GGAMPositionLossParts:
        logits = out.logits if isinstance(out, GGAMOutput) else out
        checks.matrix("out", logits, "of logits (N, K), or a GGAMOutput")
        guidance, positions, position_weight = None, None, 0.0
        if isinstance(out, GGAMOutput):
            guidance, positions = out.guidance_loss, out.position_loss
            position_weight = checks.position_weight(self.position_weight, positions is not None) or 0.0
        elif (self.guidance_weight or self.position_weight) and logits.requires_grad:
            self._without_guidance()
        if self.reduction == "none":
            self._check_each("guidance", guidance, self.guidance_weight)
            self._check_each("position", positions, position_weight)
        plain = self.weight is None and self.reduction == "mean" and not self.return_parts
        if plain and recorded is not None and not torch.compiler.is_compiling():
            replayed = recorded.loss(
                logits, guidance, target, self.guidance_weight, self.label_smoothing, self.ignore_index
            )
            if replayed is not None:
                return replayed if positions is None else replayed + position_weight * positions
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
        if guidance is not None and (self.reduction == "mean" or guidance.dim()):
            parts = [(self.guidance_weight, guidance)]
            parts += [] if positions is None else [(position_weight, positions)]
            for weight_of, part in parts:
                # A head with `guidance_reduction="none"` gives a loss of 0 to ignored images.
                if part.dim() and self.reduction == "mean":
                    part = part.sum() / self._count(target)
                loss = loss + weight_of * part
        if not self.return_parts:
            return loss
        if guidance is not None and positions is not None:
            return GGAMPositionLossParts(loss, entropy, guidance, positions)
        return GGAMLossParts(loss, entropy, logits.new_zeros(()) if guidance is None else guidance)

    def _check_each(self, name: str, given: Tensor | None, weight: float) -> None:
        if given is not None and weight and not given.dim():
            raise ValueError(
                f'reduction="none" needs {name}_weight=0, or a head with guidance_reduction="none", as the '
                f"head's {name} loss is one number for the batch; got {name}_weight={weight!r}"
            )

    def _count(self, target: Tensor) -> Tensor | int:
        """The number of images in the mean, at least 1."""
        if self.ignore_index is None or target.is_floating_point():
            return max(target.shape[0], 1)
        return (target != self.ignore_index).sum().clamp(min=1)

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
        positions = "" if self.position_weight is None else f", position_weight={self.position_weight}"
        return f"guidance_weight={self.guidance_weight}, label_smoothing={self.label_smoothing}{positions}"


@torch.compiler.assume_constant_result
def _warn(message: str) -> None:
    """A warning while the compiler traces, too."""
    warnings.warn(message, UserWarning, stacklevel=6)  # the line that calls the loss
