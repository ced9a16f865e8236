"""What S, T and beta look like, so that a report can say what a guidance changed."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ggam_fast import GGAMHead
from ggam_fast.functional import channel_sum
from ggam_fast.guidance import kl_guidance, log_cam_norm
from ggam_fast.training.data.batches import Batches
from ggam_fast.training.model.classifier import Trained, head_and_features

_TINY = torch.finfo(torch.float64).tiny


@torch.no_grad()
def statistics_of(trained: Trained, batches: Batches) -> dict[str, float]:
    """Means over all images of a split, in evaluation mode.

    `median`, `p90`: median and 90 % quantile of |beta|. `spread`: standard deviation of b~ over channels,
    divided by its mean. `guidance`: the loss for one image. `floor`: the least loss that any S can reach for
    this b~. `s_beta`: correlation of log S and beta over channels. `t_class_map`: correlation of T and the
    class activation map dT over positions. Correlations are 0 where one side is constant. `s_entropy`,
    `t_entropy`: entropy as a share of the uniform distribution's; 1 without that attention.
    """
    training = trained.training
    trained.eval()
    sums: dict[str, float] = {}
    count = 0
    for inputs, labels in batches.epoch(0):
        head, features = head_and_features(trained, inputs)
        for name, values in _of_batch(head, features, labels).items():
            sums[name] = sums.get(name, 0.0) + values.double().sum().item()
        count += len(labels)
    trained.train(training)
    return {name: value / count for name, value in sums.items()}


def _of_batch(head: GGAMHead, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    out = head(features, labels)
    beta = out.cam_weights.double()
    log_b = log_cam_norm(beta, head.cam_norm, head.cam_temperature)
    b = log_b.exp()
    s = out.channel_attention.double()
    log_s = out.channel_attention.clamp_min(torch.finfo(torch.float32).tiny).double().log()
    t = out.spatial_attention.double().flatten(1)
    return {
        "median": beta.abs().median(1).values,
        "p90": beta.abs().quantile(0.9, dim=1),
        "spread": b.std(1, correction=0) / b.mean(1),
        "guidance": kl_guidance(log_s, beta, head.cam_norm, head.cam_temperature, head.divergence),
        "floor": least_guidance(b.sum(1), head.divergence),
        "s_beta": correlation(log_s, beta),
        "t_class_map": correlation(t, class_map(head, features, labels).double().flatten(1)),
        "s_entropy": _entropy(s),
        "t_entropy": _entropy(t / t.sum(1, keepdim=True)),
    }


def class_map(head: GGAMHead, features: Tensor, labels: Tensor) -> Tensor:
    """sum_c v_c A_c (N, H, W) for the gradient v of the label's score: dT up to a positive factor."""
    asked = copy.copy(head)
    asked.cam_at, asked.cam_class = "attended", "label"  # beta is v / L there
    return channel_sum(features, asked(features, labels).cam_weights)


def least_guidance(total: Tensor, divergence: str) -> Tensor:
    """The least loss over all S, from Q = sum_c b~_c (N,). It is reached at S = b~ / Q."""
    if divergence == "forward":
        return -total.log()
    if divergence == "reverse":
        return total * total.log()
    return (total - 1) * total.log() / 2


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation over the last dimension. It is 0 where `a` or `b` is constant."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    scale = a.norm(dim=1) * b.norm(dim=1)
    constant = (a.abs().amax(1) < 1e-9) | (scale == 0)
    return torch.where(constant, 0.0, (a * b).sum(1) / scale.clamp_min(1e-300))


def _entropy(p: Tensor) -> Tensor:
    """Entropy of distributions (N, M) as a share of log M."""
    if p.shape[1] == 1:
        return torch.ones_like(p[:, 0])
    return -(p * p.clamp_min(_TINY).log()).sum(1) / torch.tensor(p.shape[1]).double().log()
