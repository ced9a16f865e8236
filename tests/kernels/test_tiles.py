"""Sizes at every limit in the plan's tables and one below and above it, with several blocks in the other
dimension; gradients of every layout and type.  Both against float64 formulas."""

import pytest
import torch
from torch import Tensor

from ggam_fast import checks
from tests.parity import relative_error

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.backends.triton import TRITON as S

EDGES = [n + d for n in (16, 32, 64, 128, 256) for d in (-1, 0, 1)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values: positions or channels adjacent, neither, or constant along an expanded axis."""
    if layout == "channels_last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "neither":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "expanded":  # as .mean((2, 3)).backward() gives
        return x[:, :, :1].expand_as(x)
    return x[:, :1, :1].expand_as(x) if layout == "all expanded" else x.contiguous()


def close(found: Tensor, expected: Tensor, tolerance: float = 3e-6) -> None:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    assert relative_error(found, expected) <= tolerance


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("edge", EDGES)
def test_around_every_tile(edge: int, layout: str, device: torch.device) -> None:
    n, c, l = (2, 130, edge) if layout == "nchw" else (2, edge, 130)
    if edge >= 127:
        c, l = (11, edge) if layout == "nchw" else (edge, 11)
    a = laid_out(torch.randn(n, c, l, device=device), layout).to(DTYPES[edge % 3])
    t, s = torch.randn(n, l, device=device), torch.randn(n, c, device=device)
    exact, eps = a.double(), torch.finfo(a.dtype).eps
    close(S.spatial_sum(a, t, 0.5), 0.5 * torch.einsum("ncl,nl->nc", exact, t.double()))
    close(S.channel_sum(a, s), torch.einsum("ncl,nc->nl", exact, s.double()))
    close(S.hadamard(a, t, s, False), exact * t.double().unsqueeze(1), eps)

    peak, index = S.max_pool(a, t)
    assert torch.equal(index, (a.float() * t.unsqueeze(1)).max(2).indices)
    assert torch.equal(peak, a.float().gather(2, index.unsqueeze(2)).squeeze(2))
    scattered = torch.zeros(n, l, device=device, dtype=torch.float64).scatter_add(1, index, s.double())
    close(S.position_scatter(s, index, l), scattered)

    product = exact * exact
    means, dots, partials = S.grad_cam_means(a, a, t)
    close(means, (exact * t.double().unsqueeze(1)).mean(2), 1e-5)
    close(dots, product.sum(2))
    close(partials.sum(1), product.sum(1))
    outer = s.double().unsqueeze(2) * t.double().unsqueeze(1)
    found = S.features_grad(a, "avg", s, index, t, t, s, s)
    close(found, outer * (1 + 1 / l) + s.double().unsqueeze(2) / l, max(eps, 3e-6))
    assert found.stride() == a.stride()


LAYOUTS = ("nchw", "channels_last", "neither", "expanded", "all expanded")


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_gradients_of_any_layout_and_type(layout: str, grad_layout: str, device: torch.device) -> None:
    n, c, l = 2, 70, 35
    kinds = DTYPES[LAYOUTS.index(layout)], DTYPES[LAYOUTS.index(grad_layout) % 3]
    a, g = (
        laid_out(torch.randn(n, c, l, device=device), where).to(dtype)
        for where, dtype in zip((layout, grad_layout), kinds, strict=True)
    )
    g = laid_out(g, grad_layout)  # a cast makes an expanded tensor dense
    assert ("expanded" in grad_layout) == (0 in g.stride())
    t, s = torch.randn(n, l, device=device), torch.randn(n, c, device=device)
    for weights in (t, None):
        means, dots, partials = S.grad_cam_means(a, g, weights)
        weighted = g.double() if weights is None else g.double() * t.double().unsqueeze(1)
        close(means, weighted.mean(2), 1e-5)
        close(dots, (a.double() * g.double()).sum(2), 1e-5)
        close(partials.sum(1), (a.double() * g.double()).sum(1), 1e-5)

        found = S.features_grad(a, "flatten", g, torch.empty(0), weights, weights, s, s)
        expected = weighted + s.double().unsqueeze(2) * t.double().unsqueeze(1)
        if weights is None:
            expected = g.double() * s.double().unsqueeze(2)
        assert found.dtype == a.dtype
        close(found, expected + s.double().unsqueeze(2) / l, max(torch.finfo(a.dtype).eps, 3e-6))


@pytest.mark.parametrize("norm", ["softmax", "sum", "sigmoid"])
@pytest.mark.parametrize("positions", [1023, 1024, 1025, 4095, 4096, 4097, 8200])
def test_normalisation_around_every_block(norm: str, positions: int, device: torch.device) -> None:
    """More positions than a program sweeps at once, and values whose exponential overflows."""
    a = laid_out(torch.rand(1, 2, positions, device=device) * 100, "channels_last")
    s, extra = torch.tensor([[1.0, 2.0]], device=device), torch.randn(1, positions, device=device)
    u = torch.einsum("ncl,nc->nl", a.double(), s.double()).requires_grad_()
    expected = {"softmax": u.softmax(1), "sum": u / u.sum(), "sigmoid": u.sigmoid()}[norm]
    t, _, total, _ = S.spatial_attention(a, s, norm)
    rounding = 4 * 300 * torch.finfo(torch.float32).eps  # an exponential's relative error is U's absolute one
    close(t, expected.detach(), rounding)
    close(total, u.detach().sum(1))
    dt = u.detach() + extra.double()
    (du,) = torch.autograd.grad(expected, u, dt)
    found = S.spatial_attention_grad(a, s, 1.0, extra, t, total, norm)
    scale = (t.double() * dt).norm() if norm != "sum" else (dt / total).norm()
    assert torch.isfinite(found).all()
    assert (found - du).norm() <= rounding * scale
