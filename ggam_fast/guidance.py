"""The guidance loss: how far channel attention S is from the normalised Grad-CAM weights b~.

    b~ = sigmoid(beta / tau)                        cam_norm="sigmoid" (the paper)
       | softmax over channels (beta / tau)         "softmax" (the authors' script)
       | sigmoid(zscore over channels(beta) / tau)  "standardized" (ours)
       | softmax(zscore over channels(beta) / tau)  "standardized_softmax" (ours)
    L = 1/2 (KL(S, b~) + KL(b~, S)) = 1/2 sum_c (S - b~)(log S - log b~)    divergence="symmetric"
      | KL(S, b~) = sum_c S (log S - log b~)                                "forward"
      | KL(b~, S) = sum_c b~ (log b~ - log S)                               "reverse" (ours)

Over the batch L is the sum for "forward", as in the authors' script, and the mean for the others.
S sums to 1 and a sigmoid over C channels to about C / 2, so most of that L is the same for every image.
"standardized_softmax" with "reverse" compares two distributions: L is at most log C for a uniform S, and
dL/de = S - b~.
The logarithms are log-softmax and log-sigmoid, never the log of a softmax.

Spatial attention T = softmax(U) has a guidance of its own (ours).  Its target is the class activation map
dT = d y / d T = kappa channel_sum(A, v) / L, as a distribution over positions:

    q = relu(dT) / sum_l relu(dT), uniform where the sum is 0      position_guidance="relu"
      | softmax(zscore over positions(dT) / tau)                   "standardized_softmax"
    L = KL(q, T) = sum_l q (log q - log T)        dL/dU = T - q     (q is constant)

Over the batch L is the mean.  It is at most log L for a uniform T.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FLAT = 8
"""How many roundings apart values may be and count as equal."""


def log_cam_norm(cam_weights: Tensor, cam_norm: str, temperature: float) -> Tensor:
    """log b~ (N, C) from beta (N, C)."""
    beta = cam_weights
    if cam_norm in ("standardized", "standardized_softmax"):
        beta = zscore(beta)
    beta = beta if temperature == 1.0 else beta / temperature
    return torch.log_softmax(beta, -1) if "softmax" in cam_norm else F.logsigmoid(beta)


def zscore(beta: Tensor) -> Tensor:
    """(beta - mean) / population deviation over the last axis; 0 where all are equal but for roundings.

    Values count as equal if they differ by at most 8 roundings of the largest.  Otherwise the z-score would
    turn the rounding of equal numbers into a target.

    beta can be 1e-7 or far smaller, so it is scaled to 1 before it is squared. The z-score does not
    depend on that scale, so no gradient goes through the scale.
    """
    # Compare the values themselves: the mean of equal values may round to another number.
    low, high = torch.aminmax(beta.detach(), dim=-1, keepdim=True)
    flat = high - low <= FLAT * torch.finfo(beta.dtype).eps * torch.maximum(high.abs(), low.abs())
    centred = (beta - beta.mean(-1, keepdim=True)).masked_fill(flat, 0.0)
    largest = centred.detach().abs().amax(-1, keepdim=True)
    unit = centred / largest.masked_fill(flat, 1.0)
    variance = unit.square().mean(-1, keepdim=True)
    return unit * torch.rsqrt(variance.masked_fill(flat, 1.0))


def kl_guidance(
    log_s: Tensor, cam_weights: Tensor, cam_norm: str, temperature: float, divergence: str
) -> Tensor:
    """L per image (N,), from log S (N, C) and beta (N, C)."""
    log_q = log_cam_norm(cam_weights, cam_norm, temperature)
    difference = log_s - log_q
    if divergence == "forward":
        return (log_s.exp() * difference).sum(-1)
    if divergence == "reverse":
        return -(log_q.exp() * difference).sum(-1)
    return 0.5 * ((log_s.exp() - log_q.exp()) * difference).sum(-1)


def kl_guidance_with_grad(
    log_s: Tensor, s: Tensor, cam_weights: Tensor, cam_norm: str, temperature: float, divergence: str
) -> tuple[Tensor, Tensor]:
    """`kl_guidance` (N,) and d L / d e (N, C) of each image, for S = softmax(e) and constant beta.

    d L / d log S_c = g_c = 1/2 (S (log S - log b~) + S - b~)   or   S (log S - log b~) + S   or   -b~
    d L / d e = g - S sum_c g_c
    """
    log_q = log_cam_norm(cam_weights, cam_norm, temperature)
    difference = log_s - log_q
    if divergence == "forward":
        weighted = s * difference
        loss, g = weighted.sum(-1), weighted + s
    elif divergence == "reverse":
        q = log_q.exp()
        loss, g = -(q * difference).sum(-1), -q
    else:
        gap = s - log_q.exp()
        loss, g = 0.5 * (gap * difference).sum(-1), 0.5 * torch.addcmul(gap, s, difference)
    return loss, torch.addcmul(g, s, g.sum(-1, keepdim=True), value=-1)


def position_target(class_map: Tensor, position_guidance: str, temperature: float) -> Tensor:
    """q (N, L), a distribution over positions, from the class activation map dT (N, L).

    A positive factor of dT changes nothing.
    """
    if position_guidance == "standardized_softmax":
        z = zscore(class_map)
        return torch.softmax(z if temperature == 1.0 else z / temperature, -1)
    positive = torch.relu(class_map)
    total = positive.sum(-1, keepdim=True)
    empty = total == 0
    uniform = 1.0 / class_map.shape[-1]
    return torch.where(empty, uniform, positive / torch.where(empty, 1.0, total))


def kl_positions(target: Tensor, log_spatial: Tensor) -> Tensor:
    """KL(q, T) per image (N,), from q (N, L) and log T (N, L)."""
    return (torch.xlogy(target, target) - target * log_spatial).sum(-1)
