"""Values far from zero, in sizes that leave a part of a block masked: what is masked must not count.

A masked element that were taken for 0 would be the largest of values far below zero.
"""

import pytest
import torch

from ggam_fast.backends.torch import Backend, CamTerms, spatial_norm, spatial_norm_grad
from ggam_fast.checks import CAM_NORM, DIVERGENCE
from ggam_fast.layer import BATCH_NORM, Layer

from .cases import check, weights  # first: it skips without triton

from ggam_fast.backends.triton import TRITON as S  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
FAR = pytest.mark.parametrize("far", [-1e4, -200.0, 200.0, 1e4])


@FAR
@pytest.mark.parametrize("l", [5, 49, 1025, 5000])
@pytest.mark.parametrize("norm", ["softmax", "sum", "sigmoid"])
def test_maps(norm: str, l: int, far: float, device: torch.device) -> None:
    """U around `far`: one channel with S = 1, so that U is A."""
    u = far + 3 * torch.randn(2, l, device=device)
    t, weighted, total, _ = S.spatial_attention(u.unsqueeze(1), torch.ones(2, 1, device=device), norm, l)
    expected, exact_total = spatial_norm(u.double(), norm)
    if norm == "sigmoid" and far < 0:  # in float32 all of these are 0
        assert (t < 1e-30).all()
        assert torch.isfinite(t).all()
    else:
        check(t, expected, 2e-6)
        check(weighted, l * expected, 2e-6)
    check(total, exact_total)


@FAR
@pytest.mark.parametrize("l", [5, 1025])
def test_grads_of_maps(l: int, far: float, device: torch.device) -> None:
    """dT around `far` through the softmax, where its mean cancels."""
    dt, t = far + torch.randn(2, l, device=device), torch.rand(2, l, device=device).softmax(1)
    du = S.spatial_norm_grad(dt, 1.0, None, t, t.sum(1), "softmax")
    expected = spatial_norm_grad(dt.double(), t.double(), t.double().sum(1), "softmax")
    # dT - <dT, T> loses as many bits as dT is larger than its spread.
    assert (du - expected).norm() <= 4e-7 * (t.double() * dt.double()).norm()


@pytest.mark.parametrize("total", [1e-30, -1e-30, 1e-13, -1e-13, 3e-6])
def test_a_tiny_sum_is_not_zero(total: float, device: torch.device) -> None:
    u = torch.tensor([[0.25, 0.25, 0.25, 0.25]], device=device) * total
    t, _, found, _ = S.spatial_attention(u.unsqueeze(1), torch.ones(1, 1, device=device), "sum")
    check(found, u.double().sum(1))
    check(t, torch.full((1, 4), 0.25, device=device, dtype=torch.float64))
    uneven = u * torch.tensor([1.0, 2.0, 3.0, -2.0], device=device)
    t, *_ = S.spatial_attention(uneven.unsqueeze(1), torch.ones(1, 1, device=device), "sum")
    check(t, torch.tensor([[0.25, 0.5, 0.75, -0.5]], device=device, dtype=torch.float64))
    dt = torch.randn(1, 4, device=device)
    du = S.spatial_norm_grad(dt, 1.0, None, t, uneven.sum(1), "sum")
    check(du, spatial_norm_grad(dt.double(), t.double(), uneven.sum(1).double(), "sum"), 1e-5)


@FAR
@pytest.mark.parametrize("c", [3, 70, 1000])
def test_channels(c: int, far: float, device: torch.device) -> None:
    logits = far + torch.randn(2, c, device=device)
    check(S.softmax(logits), logits.double().softmax(1), 1e-6)


@FAR
@pytest.mark.parametrize("cam_norm", CAM_NORM)
@pytest.mark.parametrize("divergence", DIVERGENCE)
def test_guidance(cam_norm: str, divergence: str, far: float, device: torch.device) -> None:
    """Logits and beta around `far`, a standardized beta spread as far: exp(200) is infinite in float32."""
    logits, beta = far + weights(2, 70, device), far + weights(2, 70, device)
    if cam_norm.startswith("standardized"):
        beta = far * weights(2, 70, device)
    rest = (9, cam_norm, 1.0, divergence, 1.0)
    found = S.guidance(logits, CamTerms(beta), None, *rest)
    expected = Backend().guidance(logits.double(), CamTerms(beta.double()), None, *rest)
    for value, wanted in zip(found, expected, strict=True):
        # Two logarithms are subtracted; one of them may be as large as beta.
        check(value, wanted, 1e-5 + 1e-7 * abs(far))


@pytest.mark.parametrize("value", [-3.7, 3.7])
@pytest.mark.parametrize("c", [70, 1000])
def test_equal_beta_has_no_deviation(c: int, value: float, device: torch.device) -> None:
    """The standardized beta is 0, though the mean of equal values may round."""
    logits, beta = weights(2, c, device), torch.full((2, c), value, device=device)
    rest = (9, "standardized", 1.0, "symmetric", 1.0)
    found = S.guidance(logits, CamTerms(beta), None, *rest)
    expected = Backend().guidance(logits.double(), CamTerms(0 * beta.double()), None, *rest)
    for value_found, wanted in zip(found[1:], expected[1:], strict=True):
        check(value_found, wanted, 1e-5)


@FAR
@pytest.mark.parametrize("k", [3, 70, 5000])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_cross_entropy(kind: str, k: int, far: float, device: torch.device) -> None:
    """Of logits around `far`; soft targets need not sum to one."""
    logits = far + torch.randn(4, k, device=device)
    target = 3 * torch.rand(4, k, device=device) if kind == "soft" else torch.arange(4, device=device) % k
    exact = target.double() if kind == "soft" else target
    found = S.cross_entropy(logits, target, 0.1, "label", None)
    expected = Backend().cross_entropy(logits.double(), exact, 0.1, "label", None)
    for value, wanted in zip(found, expected, strict=True):
        if wanted is not None:
            check(value, wanted, 1e-5)


@FAR
@pytest.mark.parametrize("n", [5, 129])
def test_batch_norm(n: int, far: float, device: torch.device) -> None:
    """Rows around `far`, as many as leave a part of the last block empty."""
    x = far + torch.randn(n, 9, device=device)
    layer = Layer(BATCH_NORM, *(torch.rand(9, device=device) for _ in range(2)), training=True, eps=1e-5)
    y, _ = S.batch_norm(x, layer, None)
    # The mean cancels.
    exact = layer._replace(weight=layer.weight.double(), bias=layer.bias.double())  # type: ignore[union-attr]
    wanted, _ = Backend().batch_norm(x.double(), exact, None)
    check(y, wanted, 1e-5 + 4e-7 * abs(far))
