"""Gradients of several layers at once as a stage.  `tests/kernels/test_product.py` tests all sizes."""

import pytest
import torch

from .cases import check  # first: it skips without triton

from ggam_fast.backends.triton import TRITON as S  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


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
