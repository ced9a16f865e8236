"""Small products and their gradients as stages.  `tests/kernels/test_product.py` tests all sizes."""

import pytest
import torch

from ggam_fast.backends.torch import Backend

from .cases import check  # first: it skips without triton

from ggam_fast.backends.triton import TRITON as S  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_multiplied_in_float32(
    dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = torch.randn(5, 40, device=device), torch.randn(9, 40, device=device).to(dtype)
    bias = torch.randn(9, device=device).to(dtype)
    (found,) = S.product([x], weight.t(), bias)
    assert found.dtype == torch.float32
    check(found, x.double() @ weight.double().t() + bias.double())


def test_the_channel_mlp(device: torch.device) -> None:
    mean, w1, w2 = (torch.randn(*s, device=device) for s in ((3, 20), (6, 20), (20, 6)))
    b1, b2 = torch.randn(6, device=device), torch.randn(20, device=device)
    found = S.channel_mlp(mean, w1, b1, w2, b2)
    expected = Backend().channel_mlp(*(x.double() for x in (mean, w1, b1, w2, b2)))
    for x, y in zip(found, expected, strict=True):
        check(x, y)


@pytest.mark.parametrize("neighbours", [True, False])
def test_vectors_are_scaled_with_the_layers(neighbours: bool, device: torch.device) -> None:
    """In the launch of the layers' gradients where two vectors lie side by side, else by torch."""
    dy, x, scale = torch.randn(7, 5, device=device), torch.randn(7, 8, device=device), torch.tensor(-0.3)
    scale = scale.to(device)
    pair = torch.randn(2, 6, device=device)
    vectors = list(pair) if neighbours else [pair[0].clone(), pair[1].clone()]
    ((dw, db),), scaled = S.parameter_grads([(dy, x)], vectors, scale)
    check(dw, -0.3 * dy.double().t() @ x.double(), 1e-5)
    check(db, -0.3 * dy.double().sum(0), 1e-5)
    for found, given in zip(scaled, vectors, strict=True):
        check(found, -0.3 * given.double(), 1e-5)
