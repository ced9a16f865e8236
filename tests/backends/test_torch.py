"""The torch backend's alternative code paths give the same numbers."""

import pytest
import torch
import torch.nn.functional as F

from ggam_fast.backends.torch import Backend, CamTerms, rows_times, rows_times_by_sum, scaled, softmax_grad
from ggam_fast.layer import BATCH_NORM, Layer


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


def test_the_compiled_form_of_a_softmaxs_gradient(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    s, ds = torch.rand(3, 7, device=device).softmax(1), torch.randn(3, 7, device=device)
    eager = softmax_grad(ds, s)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(softmax_grad(ds, s), eager)


def test_a_bias_is_added_to_each_of_several_rows(device: torch.device) -> None:
    rows, w, b = (
        torch.randn(2, 3, 5, device=device),
        torch.randn(5, 4, device=device),
        torch.randn(4).to(device),
    )
    for found, x in zip(Backend().product(list(rows), w, b), rows, strict=True):
        torch.testing.assert_close(found, x @ w + b)


def test_batch_norm_with_running_statistics_of_another_type(device: torch.device) -> None:
    x, v = torch.randn(2, 6, 4, device=device)
    mean, variance = torch.randn(4).to(device, torch.float64), torch.rand(4).to(device, torch.float64)
    gamma, beta = torch.rand(2, 4, device=device)
    layer = Layer(BATCH_NORM, gamma, beta, mean, variance, None, eps=1e-5, momentum=0.1)
    (dx,), dgamma, dbeta = Backend().batch_norm_grad([v], x, layer, None, ())
    scale = (variance + 1e-5).rsqrt()
    torch.testing.assert_close(dx, (v * gamma * scale).float())
    torch.testing.assert_close(dgamma, (v * (x - mean) * scale).sum(0).float())
    torch.testing.assert_close(dbeta, v.sum(0))


@pytest.mark.parametrize("mean", [True, False])
def test_guided_loss_leaves_ignored_images_out(mean: bool, device: torch.device) -> None:
    """Also one whose map is not finite."""
    logits, beta = torch.randn(2, 3, 5, device=device)
    losses = torch.rand(3, device=device)
    beta[1], losses[1] = float("nan"), 0.0
    share = torch.tensor([0.5, 0.0, 0.5], device=device)
    options = (4, "sigmoid", 1.0, "symmetric", 0.3, mean)
    found = Backend().guided_loss(logits, CamTerms(beta), None, *options, share, losses)
    rest = [0, 2]
    expected = Backend().guided_loss(logits[rest], CamTerms(beta[rest]), None, *options, None, losses[rest])
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.guidance, expected.guidance)
    for name in ("cam_weights", "channel", "losses", "grad_logits"):
        torch.testing.assert_close(getattr(found, name)[rest], getattr(expected, name))
    torch.testing.assert_close(found.channel, logits.softmax(1))
    assert found.losses[1] == 0
    assert not found.grad_logits[1].any()


@pytest.mark.parametrize("cam_class", ["label", "predicted"])
def test_class_scores_of_ignored_images_are_zero(cam_class: str, device: torch.device) -> None:
    logits = torch.eye(3, device=device)
    target = torch.tensor([2, -100, 1], device=device)
    score, share = Backend().class_scores(logits, target, cam_class, -100)
    picked = target if cam_class == "label" else torch.arange(3, device=device)
    expected = torch.eye(3, device=device)[picked.clamp(min=0)]
    expected[1] = 0
    assert torch.equal(score, expected)
    assert share is not None
    assert share.tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("channels_last", [False, True])
def test_da_has_memory_of_its_own_for_each_element(channels_last: bool, device: torch.device) -> None:
    """Where it is constant over positions too: a hook may change it in place."""
    a = torch.randn(2, 3, 4, device=device)
    a = a.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else a
    first, s = torch.randn(2, 2, 3, device=device)
    da = Backend().features_grad(a, "avg", first, None, None, None, s, None)
    torch.testing.assert_close(da, (first / 4)[:, :, None].expand(2, 3, 4))
    assert 0 not in da.stride()


def test_each_tensor_is_scaled_whatever_its_size(device: torch.device) -> None:
    scale = torch.tensor(3.0, device=device)
    given = [torch.ones(n, device=device) * n for n in (1 << 16, (1 << 16) + 1, 100_000, 2, 140_000)]
    found = scaled([given[0], None, *given[1:]], scale)
    assert found.pop(1) is None
    for x, y in zip(given, found, strict=True):
        assert torch.equal(y, 3 * x)


def test_the_gradient_where_one_image_counts(device: torch.device) -> None:
    logits = torch.randn(3, 5, device=device)
    found = Backend().cross_entropy(logits, torch.tensor([-1, 4, -1], device=device), 0.1, "label", -1)
    alone = Backend().cross_entropy(logits[1:2], torch.tensor([4], device=device), 0.1, "label", None)
    torch.testing.assert_close(found.losses[1:2], alone.losses)
    torch.testing.assert_close(found.grad[1:2], alone.grad)
    assert not found.grad[[0, 2]].any()
