"""The contractions have derivatives of every order, equal to torch's."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import ggam_fast  # noqa: F401  (registers the backends)
from ggam_fast.backends.registry import get_differentiable

N, C, L = 2, 3, 4


def inputs(device: torch.device, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((N, C, L), (N, width))
    )  # type: ignore[return-value]


def test_channel_sum(device: torch.device) -> None:
    backend, (a, s) = get_differentiable("torch"), inputs(device, C)
    torch.testing.assert_close(backend.channel_sum(a, s), torch.einsum("ncl,nc->nl", a, s))
    assert gradcheck(backend.channel_sum, (a, s))
    assert gradgradcheck(backend.channel_sum, (a, s))


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_spatial_sum(scale: float, device: torch.device) -> None:
    backend, (a, t) = get_differentiable("torch"), inputs(device, L)

    def call(a: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return backend.spatial_sum(a, t, scale)

    torch.testing.assert_close(call(a, t), scale * torch.einsum("ncl,nl->nc", a, t))
    assert gradcheck(call, (a, t))
    assert gradgradcheck(call, (a, t))
