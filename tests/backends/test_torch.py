"""The torch backend's alternative code paths give the same numbers."""

import pytest
import torch
import torch.nn.functional as F

from ggam_fast.backends.torch import Backend, rows_times, rows_times_by_sum


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_in_both_layouts(n: int, channels_last: bool, dtype: torch.dtype, device: torch.device) -> None:
    a = torch.randn(n, 5, 7).to(device, dtype)
    a = a.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else a
    found = Backend().spatial_sum(a, None, 1 / 7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), a.double().mean(2), rtol=1e-6, atol=1e-7)


def test_rows_times_in_both_forms(device: torch.device) -> None:
    """As a product, and as the sum that a GPU's compiler gets."""
    rows, matrix = (torch.randn(shape).to(device) for shape in ((3, 2, 5), (3, 5, 7)))
    expected = torch.matmul(rows.double(), matrix.double())
    for form in (rows_times, rows_times_by_sum):
        torch.testing.assert_close(form(rows, matrix).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("total", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_targets_need_not_sum_to_one(smoothing: float, total: float, device: torch.device) -> None:
    """Both seeds of the cross entropy against autograd's."""
    logits = torch.randn(4, 6, device=device, dtype=torch.float64, requires_grad=True)
    target = total * torch.rand(4, 6, device=device, dtype=torch.float64).softmax(1)
    found = Backend().cross_entropy(logits.detach(), target, smoothing, "label", None)
    loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found.losses, loss.detach())
    torch.testing.assert_close(found.grad, torch.autograd.grad(loss.mean(), logits)[0])
    torch.testing.assert_close(found.score, target)
