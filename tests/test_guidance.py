"""The divergences, their targets and gradients."""

import math

import pytest
import torch
from torch import Tensor

from ggam_fast import GGAMHead
from ggam_fast.guidance import kl_guidance, kl_guidance_with_grad, log_cam_norm
from tests.parity import OPTIONS, K, pair


def distributions(device: torch.device) -> tuple[Tensor, Tensor]:
    """e, whose softmax is S, and beta"""
    return tuple(torch.randn(3, 7, dtype=torch.float64, device=device) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("cam_norm", OPTIONS["cam_norm"])
@pytest.mark.parametrize("divergence", OPTIONS["divergence"])
def test_gradient_is_that_of_autograd(divergence: str, cam_norm: str, device: torch.device) -> None:
    e, beta = distributions(device)
    e.requires_grad_()
    log_s = e.log_softmax(1)
    expected = kl_guidance(log_s, beta, cam_norm, 0.7, divergence)
    (gradient,) = torch.autograd.grad(expected.sum(), e)
    with torch.no_grad():
        found = kl_guidance_with_grad(log_s, log_s.exp(), beta, cam_norm, 0.7, divergence)
    torch.testing.assert_close(found, (expected.detach(), gradient))


def test_no_divergence_from_itself(device: torch.device) -> None:
    """Softmax of beta against itself is 0, and a divergence is positive elsewhere."""
    e, beta = distributions(device)
    same = kl_guidance(beta.log_softmax(1), beta, "softmax", 1.0, "symmetric")
    torch.testing.assert_close(same, torch.zeros_like(same))
    assert (kl_guidance(e.log_softmax(1), beta, "softmax", 1.0, "symmetric") > 0).all()


def test_targets_of_a_tiny_beta(device: torch.device) -> None:
    """Standardized beta does not depend on its scale; sigmoid(beta) is one half."""
    _, beta = distributions(device)
    found = log_cam_norm(1e-7 * beta, "standardized", 1.0)
    torch.testing.assert_close(found, log_cam_norm(beta, "standardized", 1.0))
    half = log_cam_norm(1e-7 * beta, "sigmoid", 1.0).exp()
    torch.testing.assert_close(half, torch.full_like(half, 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [1 / 3, 1e-7])
def test_a_flat_beta_is_standardized_to_zero(value: float, device: torch.device) -> None:
    head, reference = pair(1000, K, device=device, cam_norm="standardized")
    log_s = torch.randn(2, 1000, dtype=torch.float64, device=device).log_softmax(1)
    beta = torch.full_like(log_s, value)  # the mean of 1,000 of them rounds
    found = kl_guidance(log_s, beta, head.cam_norm, 1.0, head.divergence).mean()
    torch.testing.assert_close(found, kl_guidance(log_s, 0 * beta, "sigmoid", 1.0, head.divergence).mean())
    torch.testing.assert_close(reference.guidance(log_s, beta), found)


def test_two_distributions_are_commensurate(device: torch.device) -> None:
    """KL(q, S) of q = softmax(zscore(beta)): at most log C for a uniform S, and its gradient is S - q."""
    beta = torch.randn(5, 30, dtype=torch.float64, device=device) * 1e-6
    e = torch.zeros(5, 30, dtype=torch.float64, device=device, requires_grad=True)
    log_s = e.log_softmax(1)
    loss = kl_guidance(log_s, beta, "standardized_softmax", 0.5, "reverse")
    q = (((beta - beta.mean(1, keepdim=True)) / beta.std(1, keepdim=True, correction=0)) / 0.5).softmax(1)
    assert (loss > 0).all()
    assert (loss < math.log(30)).all()
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), e)[0], log_s.exp() - q)
    aligned = kl_guidance(q.log(), beta, "standardized_softmax", 0.5, "reverse")
    torch.testing.assert_close(aligned, torch.zeros_like(aligned), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["spatial", "none"])
def test_a_target_for_channels_needs_channel_attention(attention: str) -> None:
    with pytest.raises(ValueError, match='cam_norm="standardized_softmax" is a target for channel attention'):
        GGAMHead(8, 3, attention=attention, cam_norm="standardized_softmax")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_but_for_roundings_is_flat(dtype: torch.dtype, device: torch.device) -> None:
    """Up to 8 roundings count as equal; a spread of more is standardized."""
    eps = torch.finfo(dtype).eps
    beta = torch.full((2, 30), 1e-3, dtype=dtype, device=device)
    beta[:, 0] *= 1 + 4 * eps
    flat = log_cam_norm(beta, "standardized_softmax", 1.0)
    torch.testing.assert_close(flat, torch.full_like(flat, -math.log(30)))
    beta[:, 0] *= 1 + 100 * eps
    assert log_cam_norm(beta, "standardized_softmax", 1.0)[0, 0] > -1.0
