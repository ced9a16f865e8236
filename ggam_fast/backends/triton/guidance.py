"""S = softmax(e) and back through it; beta, the guidance loss and its gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import launch
from .register import operator
from .shapes import FP_FUSION, contiguous, empty, per_image, plan, small

from ggam_fast.kernels import guidance as guidance_kernels  # isort: skip
from ggam_fast.kernels import softmax as softmax_kernels  # isort: skip


def _channels(channels: int) -> dict[str, int]:
    block = plan.channels_block(channels)
    assert block is not None
    return {"C": channels, "BLOCK_C": block[0], "num_warps": block[1], **FP_FUSION}


@operator
def softmax(logits: Tensor) -> Iterator[Tensor]:
    """S (N, C)"""
    batch, channels = logits.shape
    s = small(batch, channels, logits)
    yield s
    if batch:
        launch(softmax_kernels.softmax_kernel, batch, logits.contiguous(), s, **_channels(channels))


@operator
def softmax_grad(ds: Tensor, s: Tensor, extra: Tensor | None, scale: Tensor | None) -> Iterator[Tensor]:
    """de (N, C), plus scale times extra"""
    batch, channels = ds.shape
    de = small(batch, channels, ds)
    yield de
    if batch:
        launch(
            softmax_kernels.softmax_grad_kernel, batch,
            s.contiguous(), ds.contiguous(), contiguous(extra), scale, de, **_channels(channels),
        )  # fmt: skip


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
    symmetric: bool,
    temperature: float,
    weight: float,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(beta, S, loss of each image, de), see `Backend.guidance`"""
    beta, s, de = (empty(logits.shape, logits) for _ in range(3))
    losses = per_image(logits.shape[0], logits)
    yield beta, s, losses, de
    _launch(
        logits, (first, t, du, grad_mean, ds), (beta, s, losses, de), (None,) * 5, positions, cam_norm,
        symmetric, temperature, weight, True,
    )  # fmt: skip


@operator
def guided_loss(
    logits: Tensor,
    first: Tensor,
    t: Tensor | None,
    du: Tensor | None,
    grad_mean: Tensor | None,
    ds: Tensor | None,
    positions: int,
    cam_norm: int,
    symmetric: bool,
    temperature: float,
    weight: float,
    mean: bool,
    share: Tensor,
    losses: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """`Guided`; the whole loss is empty without cross entropies"""
    beta, s, de = (empty(logits.shape, logits) for _ in range(3))
    per_image_losses = per_image(logits.shape[0], logits)
    total, loss = empty((), logits), empty(() if losses is not None else (0,), logits)
    yield beta, s, per_image_losses, de, total, loss
    if not logits.shape[0]:
        total.zero_()
        loss.zero_()
        return
    counter = torch.zeros((1,), dtype=torch.int32, device=logits.device)
    sums = (share, counter, losses, total, loss if losses is not None else None)
    _launch(
        logits, (first, t, du, grad_mean, ds), (beta, s, per_image_losses, de), sums, positions, cam_norm,
        symmetric, temperature, weight, mean,
    )  # fmt: skip


def _launch(
    logits: Tensor,
    terms: tuple[Tensor | None, ...],
    out: tuple[Tensor, ...],
    sums: tuple[Tensor | None, ...],
    positions: int,
    cam_norm: int,
    symmetric: bool,
    temperature: float,
    weight: float,
    mean: bool,
) -> None:
    batch, channels = logits.shape
    sizes = _channels(channels)
    if batch:
        launch(
            guidance_kernels.guidance_kernel, batch,
            logits.contiguous(), *(contiguous(x) for x in terms), *out, weight, temperature, *sums,
            L=positions, CAM_NORM=cam_norm, SYMMETRIC=symmetric, MEAN=mean,
            BLOCK_L=plan.map_block(positions, sizes["num_warps"]), **sizes,
        )  # fmt: skip
