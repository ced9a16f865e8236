"""Batch norm whose running statistics start from the first batch instead of 0 and 1."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import Layer


class SettlingBatchNorm1d(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` whose running statistics drop their initial 0 and 1 with the first batch.

        running = (1 - f) running + f batch        f = max(momentum, 1 / batches seen)

    The first 1 / momentum batches are averaged.  From then on this is torch's exponential average.  After 36
    batches torch's running variance still holds 0.9^36 = 2 % of its initial 1.0, which is 9,000 times the
    variance of features as the paper prints them.  Constructor and state dict are torch's.
    `momentum=None` averages all batches, as in torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C), or (N, C, L) -> the same shape."""
        if not (self.training and self.track_running_stats) or self.momentum is None:
            return super().forward(input)
        self._check_input_dim(input)
        y = F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
        settle(input, self.running_mean, self.running_var, self.num_batches_tracked, self.momentum)
        return y


@torch.no_grad()
def settle(
    x: Tensor, mean: Tensor | None, var: Tensor | None, tracked: Tensor | None, momentum: float
) -> None:
    """Update the running mean and variance with the batch x (N, C, ...)."""
    if mean is None or var is None or tracked is None:
        return
    variance, batch_mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    _move(mean, var, tracked, momentum, True, batch_mean, variance, x.numel() // x.shape[1])


def move(layer: Layer, mean: Tensor, variance: Tensor, count: int) -> None:
    """Update a batch norm's running statistics with the mean and biased variance (C,) of `count` rows."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    running = layer.running_mean, layer.running_var, layer.tracked
    _move(*running, layer.momentum, layer.settling, mean, variance, count)


def _move(
    running_mean: Tensor,
    running_var: Tensor,
    tracked: Tensor | None,
    momentum: float | None,
    settling: bool,
    mean: Tensor,
    variance: Tensor,
    count: int,
) -> None:
    factor: float | Tensor = momentum or 0.0
    if tracked is not None:
        tracked.add_(1)
        if settling or momentum is None:
            factor = torch.clamp(1.0 / tracked, min=momentum or 0.0).to(running_mean.dtype)
    running_mean.lerp_(mean.to(running_mean.dtype), factor)
    running_var.lerp_((variance * (count / max(count - 1, 1))).to(running_var.dtype), factor)
