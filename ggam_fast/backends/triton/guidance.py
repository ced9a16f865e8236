"""S = softmax(e) and its gradient; beta, the guidance loss and its gradient."""

import torch
from torch import Tensor

from ggam_fast.backends.torch import CamTerms, Guided

from .launch import (
    CAM_NORM,
    DIVERGENCE,
    FP_FUSION,
    contiguous,
    empty,
    launch,
    per_image,
    plan,
    runs,
    small,
    thread,
)
from .register import KernelBackend, operator

from ggam_fast.kernels import guidance as guidance_kernels  # isort: skip
from ggam_fast.kernels import softmax as softmax_kernels  # isort: skip


class Guidance(KernelBackend):
    """The stages of this file if one program can hold a row, else torch's."""

    def softmax(self, logits: Tensor) -> Tensor:
        if not _holds(logits):
            return super().softmax(logits)
        return self.run.softmax(logits)

    def softmax_grad(
        self, ds: Tensor, s: Tensor, extra: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        if not _holds(s):
            return super().softmax_grad(ds, s, extra, scale)
        return self.run.softmax_grad(ds, s, extra, scale)

    def guidance(
        self,
        logits: Tensor,
        terms: CamTerms,
        ds: Tensor | None,
        positions: int,
        cam_norm: str,
        temperature: float,
        divergence: str,
        weight: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not _holds(logits):
            return super().guidance(logits, terms, ds, positions, cam_norm, temperature, divergence, weight)
        return self.run.guidance(
            logits, *terms, ds, positions, CAM_NORM[cam_norm], DIVERGENCE[divergence], temperature, weight,
            True, None, None, None, 0.0,
        )[:4]  # fmt: skip

    def guided_loss(
        self,
        logits: Tensor,
        terms: CamTerms,
        ds: Tensor | None,
        positions: int,
        cam_norm: str,
        temperature: float,
        divergence: str,
        weight: float,
        mean: bool,
        share: Tensor | None,
        losses: Tensor | None,
        position_losses: Tensor | None = None,
        position_weight: float = 0.0,
    ) -> Guided:
        if share is None or not _holds(logits):
            return super().guided_loss(
                logits, terms, ds, positions, cam_norm, temperature, divergence, weight, mean, share, losses,
                position_losses, position_weight,
            )  # fmt: skip
        beta, s, each, de, guidance_loss, loss, of_positions = self.run.guidance(
            logits, *terms, ds, positions, CAM_NORM[cam_norm], DIVERGENCE[divergence], temperature, weight,
            mean, share, losses, position_losses, position_weight,
        )  # fmt: skip
        return Guided(
            beta, s, each, de, guidance_loss, guidance_loss if losses is None else loss,
            None if position_losses is None else of_positions,
        )  # fmt: skip


def _holds(rows: Tensor) -> bool:
    """Whether one program can hold a row."""
    return plan.channels_block(rows.shape[1]) is not None and rows.dtype == torch.float32


def _channels(channels: int) -> dict[str, int]:
    block = plan.channels_block(channels)
    assert block is not None
    return {"C": channels, "BLOCK_C": block[0], "num_warps": block[1], **FP_FUSION}


@operator
def softmax(logits: Tensor) -> Tensor:
    """S = softmax(e) (N, C)."""
    batch, channels = logits.shape
    sizes = _channels(channels)
    s = small(batch, channels, logits)
    if runs(batch):
        launch(softmax_kernels.softmax_kernel, batch, logits.contiguous(), s, **sizes)
    return s


@operator
def softmax_grad(ds: Tensor, s: Tensor, extra: Tensor | None, scale: Tensor | None) -> Tensor:
    """de (N, C), plus scale times `extra`."""
    batch, channels = ds.shape
    sizes = _channels(channels)
    de = small(batch, channels, ds)
    if runs(batch):
        launch(
            softmax_kernels.softmax_grad_kernel, batch,
            s.contiguous(), ds.contiguous(), contiguous(extra), scale, de, **sizes,
        )  # fmt: skip
    return de


@operator
def guidance(
    logits: Tensor,
    first: Tensor,
    t: Tensor | None,
    du: Tensor | None,
    grad_mean: Tensor | None,
    ds: Tensor | None,
    positions: int,
    cam_norm: int,
    divergence: int,
    temperature: float,
    weight: float,
    mean: bool,
    share: Tensor | None,
    losses: Tensor | None,
    position_losses: Tensor | None,
    position_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Guided`.

    Without shares nothing is reduced: the last three are empty, and de is the gradient of each image's loss.
    Without cross entropies the loss is empty, without position losses the last one.
    """
    batch, channels = logits.shape
    sizes = _channels(channels)
    beta, s, de = (
        small(batch, channels, logits),
        small(batch, channels, logits),
        small(batch, channels, logits),
    )
    of_images = per_image(batch, logits)
    total = empty(() if share is not None else (0,), logits)
    loss = empty(() if share is not None and losses is not None else (0,), logits)
    guides = share is not None and position_losses is not None
    of_positions = empty(() if guides else (0,), logits)
    if runs(batch):
        counter = None
        if share is not None:
            counter = torch.zeros((1,), dtype=torch.int32, device=logits.device)
        launch(
            guidance_kernels.guidance_kernel, batch,
            logits.contiguous(), contiguous(first), contiguous(t), contiguous(du), contiguous(grad_mean),
            contiguous(ds), beta, s, of_images, de, weight, temperature, share, counter, losses,
            None if share is None else total, None if share is None or losses is None else loss,
            position_losses if guides else None, of_positions if guides else None,
            position_weight if guides else None,
            L=positions, STANDARDIZED=cam_norm >= 2, SOFTMAX=cam_norm % 2 == 1, DIVERGENCE=divergence,
            MEAN=mean, BLOCK_L=plan.map_block(positions, sizes["num_warps"]), **sizes,
        )  # fmt: skip
    elif not thread.faked:
        total.zero_()
        loss.zero_()
        of_positions.zero_()
    return beta, s, of_images, de, total, loss, of_positions
