"""timm's training task with guidance. It needs a timm with `timm.task`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from . import checks
from .base import GGAMHeadBase, GGAMOutput
from .losses import GGAMLoss

try:
    from timm.task import ClassificationTask
except ImportError as error:
    raise ImportError("GGAMTask needs a timm that has timm.task: pip install -U timm") from error


class GGAMTask(ClassificationTask):
    """timm's `ClassificationTask` with guidance: criterion(logits, target) + guidance_weight * L_GGAM.

    The position loss of a head with `position_guidance` is added too, times position_weight.

    timm's train loop calls `task(input, target)["loss"].backward()`. A plain `ClassificationTask` would give
    the model no target, so nothing would guide the attention.

    Args:
        model: of `create_model` or `replace_head`; or one whose `forward(images, target)` gives a
            `GGAMOutput`.
        criterion: timm's loss on logits, or None for the one that timm makes of `criterion_kwargs`. It must
            not be a `GGAMLoss`, because the task adds the guidance itself. Soft targets of mixup work.
        guidance_weight: lambda >= 0, as in `GGAMLoss`.
        position_weight: weight of the position loss, as in `GGAMLoss`.
        options: those of timm's `ClassificationTask`: `criterion_kwargs`, `device`, `dtype`, `verbose`.

    The returned dictionary has timm's "loss" and "output", and "classification_loss" and "guidance_loss",
    the latter without its weight; and "position_loss" if there is one. EMA, DDP, torch.compile, checkpoints
    and evaluation are timm's.

    Raises:
        ImportError: timm is not installed, or has no `timm.task`.
        TypeError: the model has no GGAM head.

    Examples:
        >>> model = ggam_fast.create_model("resnet18", 10)
        >>> task = ggam_fast.GGAMTask(model, criterion_kwargs={"smoothing": 0.1}, guidance_weight=1e-3)
        >>> task(images, target)["loss"].backward()
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        guidance_weight: float = 1e-3,
        position_weight: float | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module) or not any(isinstance(m, GGAMHeadBase) for m in model.modules()):
            raise TypeError(
                f"model must have a GGAM head; got {type(model).__name__}: use create_model or replace_head"
            )
        if isinstance(criterion, GGAMLoss):
            raise TypeError(
                "criterion must be a loss on logits, because the task adds the guidance; got GGAMLoss: give "
                "guidance_weight= and criterion_kwargs="
            )
        super().__init__(model, criterion, **options)
        self.guidance_weight, _ = checks.loss_weights(guidance_weight, 0.0)
        self.position_weight = checks.position_weight(position_weight)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The losses, and the logits as "output", of images (N, C, H, W)."""
        out = self.trainable_module(input, target)
        if not isinstance(out, GGAMOutput):
            raise TypeError(f"model(input, target) must give a GGAMOutput; got {type(out).__name__}")
        classification = self.criterion(out.logits, target)
        loss, positions = classification + self.guidance_weight * out.guidance_loss, out.position_loss
        weight = checks.position_weight(self.position_weight, positions is not None)
        found = {
            "loss": loss if positions is None else loss + (weight or 0.0) * positions,
            "output": out.logits,
            "classification_loss": classification.detach(),
            "guidance_loss": out.guidance_loss.detach(),
        }
        if positions is not None:
            found["position_loss"] = positions.detach()
        return found
