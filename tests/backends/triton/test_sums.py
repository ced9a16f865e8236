"""The passes that sum over A, against float64 formulas on the same (upcast) inputs."""

import zlib

import pytest
import torch

from ggam_fast.backends.torch import Backend, spatial_norm

from .cases import ALL, FUSED, check, make, weights  # first: it skips without triton

from ggam_fast.backends.triton import TRITON as S  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

NORMS = ("softmax", "sum", "sigmoid")


@ALL
def test_contractions(n: int, c: int, l: int, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    a, t, s = make(n, c, l, device, dtype, layout), weights(n, l, device), weights(n, c, device)
    exact = a.double()
    check(S.spatial_sum(a, t, 0.25), 0.25 * torch.einsum("ncl,nl->nc", exact, t.double()))
    check(S.spatial_sum(a, None, 1.0 / l), exact.mean(2))
    check(S.channel_sum(a, s), torch.einsum("ncl,nc->nl", exact, s.double()))


@ALL
@pytest.mark.parametrize("kappa", [1, 7])
@pytest.mark.parametrize("norm", ["softmax", "sum", "sigmoid"])
def test_spatial_attention_and_its_gradient(
    n: int, c: int, l: int, layout: str, dtype: torch.dtype, norm: str, kappa: int, device: torch.device
) -> None:
    a = make(n, c, l, device, dtype, layout).abs()
    s, v, extra = weights(n, c, device).abs(), weights(n, c, device), weights(n, l, device)
    u = torch.einsum("ncl,nc->nl", a.double(), s.double() / 16).requires_grad_()
    expected, _ = spatial_norm(u, norm)
    t, multiplied, total, _ = S.spatial_attention(a, s / 16, norm, kappa)
    check(t, expected.detach(), 1e-5)
    assert torch.equal(multiplied, t[:0, 0] if kappa == 1 else kappa * t)
    check(total, u.detach().sum(1), 1e-5)

    dt = torch.einsum("ncl,nc->nl", a.double(), v.double())
    for upstream, given in ((dt, None), (dt + extra, extra)):
        (du,) = torch.autograd.grad(expected, u, upstream, retain_graph=True)
        found = S.spatial_attention_grad(a, v, 1.0, given, t, total, norm)
        # dU is a difference of terms of the size of dT * dT/dU.
        scale = (t.double() * upstream).norm() if norm != "sum" else (upstream / total[:, None]).norm()
        assert torch.isfinite(found).all()
        assert (found - du).norm() <= 2e-5 * scale.clamp_min(1e-30)


def test_sum_of_an_all_zero_map_is_uniform(device: torch.device) -> None:
    a = torch.zeros(2, 6, 9, device=device)
    a[1] = 1.0
    s = torch.full((2, 6), 1 / 6, device=device)
    t, _, total, _ = S.spatial_attention(a, s, "sum")
    assert torch.allclose(t, torch.full_like(t, 1 / 9))
    du = S.spatial_attention_grad(a, s, 1.0, weights(2, 9, device), t, total, "sum")
    assert torch.equal(du[0], torch.zeros(9, device=device))
    assert torch.isfinite(du).all()


def test_a_map_of_many_positions(device: torch.device) -> None:
    a = torch.randn(1, 1, 4097, device=device)  # one above a block of the normalisation
    t, *_ = S.spatial_attention(a, torch.ones(1, 1, device=device), "softmax")
    check(t, a.double().softmax(2)[:, 0], 1e-5)


@FUSED
@pytest.mark.parametrize("rows", [1, 2])
def test_the_backward_of_one_and_of_two_gradients(
    n: int,
    c: int,
    l: int,
    layout: str,
    dtype: torch.dtype,
    rows: int,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    turn = zlib.crc32(request.node.nodeid.encode())
    norm = NORMS[turn % 3]
    a = make(n, c, l, device, dtype, layout).abs()
    grads, extra = [torch.randn(n, c, device=device) for _ in range(rows)], torch.randn(n, l, device=device)
    u = torch.einsum("ncl,nc->nl", a.double(), weights(n, c, device).double().abs() / 16).requires_grad_()
    t, total = spatial_norm(u, norm)
    for given in (None, extra) if rows == 1 else (None,):
        pairs = S.attention_backward(a, grads, 0.3, given, t.detach().float(), total.detach().float(), norm)
        assert len(pairs) == rows
        for v, (found, ds) in zip(grads, pairs, strict=True):
            dt = 0.3 * torch.einsum("ncl,nc->nl", a.double(), v.double())
            dt = dt if given is None else dt + given
            (du,) = torch.autograd.grad(t, u, dt, retain_graph=True)
            # dU is a difference of terms of the size of dT * dT/dU, and so is what is summed up of it.
            scale = t if norm != "sum" else 1 / total[:, None]
            terms = (scale * dt).detach().abs()
            assert torch.isfinite(found).all()
            assert (found - du).norm() <= 1e-5 * terms.norm()
            bound = torch.einsum("ncl,nl->nc", a.double().abs(), terms)
            assert torch.isfinite(ds).all()
            assert (ds - torch.einsum("ncl,nl->nc", a.double(), du)).norm() <= 1e-5 * bound.norm()


@pytest.mark.parametrize("l", [7, 49, 4097])
@pytest.mark.parametrize("stages", [S, Backend()], ids=["kernels", "torch"])
def test_a_constant_gradient_of_a_sum_normed_map_vanishes(
    stages: Backend, l: int, device: torch.device
) -> None:
    """dU = (dT - <dT, T>) / sum U is zero for a constant dT, though <dT, T> rounds and sum U is small."""
    t = torch.rand(5, l, device=device)
    t /= t.sum(1, keepdim=True)
    total, dt = torch.full((5,), 1e-3, device=device), torch.full((5, l), 0.7, device=device)
    du = stages.spatial_norm_grad(dt, 1.0, None, t, total, "sum")
    a_rounding = 0.7 / 1e-3 * torch.finfo(torch.float32).eps
    assert float(du.abs().max()) < 1e-2 * a_rounding
