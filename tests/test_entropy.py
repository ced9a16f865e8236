"""Cross entropy over the images that count, and reductions over a batch."""

import pytest
import torch
import torch.nn.functional as F

from ggam_fast.entropy import cross_entropy, reduce_batch


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_is_the_mean_of_torchs(smoothing: float, device: torch.device) -> None:
    logits = torch.randn(4, 5, device=device)
    for target in (torch.tensor([0, 4, 1, 1], device=device), torch.rand(4, 5, device=device).softmax(1)):
        found = cross_entropy(logits, target, smoothing)
        torch.testing.assert_close(found, F.cross_entropy(logits, target, label_smoothing=smoothing))


def test_an_ignored_image_has_no_loss_and_no_gradient(device: torch.device) -> None:
    logits = torch.randn(3, 5, device=device)
    logits[1] = float("nan")
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, torch.tensor([0, -100, 2], device=device), 0.0, ignore_index=-100)
    rest = torch.tensor([0, 2], device=device)
    torch.testing.assert_close(loss, F.cross_entropy(logits[rest], rest))
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[1].any()


def test_one_image_of_two_that_counts(device: torch.device) -> None:
    logits, target = torch.randn(2, 5, device=device), torch.tensor([-100, 3], device=device)
    found = cross_entropy(logits, target, 0.0, ignore_index=-100)
    torch.testing.assert_close(found, F.cross_entropy(logits[1:], target[1:]))


def test_nothing_to_count_is_zero(device: torch.device) -> None:
    target = torch.full((2,), -100, device=device)
    assert cross_entropy(torch.randn(2, 5, device=device), target, 0.0, ignore_index=-100) == 0
    assert cross_entropy(torch.randn(0, 5, device=device), target[:0], 0.0) == 0
    assert reduce_batch(torch.empty(0, device=device), "mean") == 0


def test_reductions(device: torch.device) -> None:
    losses = torch.tensor([1.0, 2.0, float("nan")], device=device)
    assert reduce_batch(losses[:2], "mean") == 1.5
    assert reduce_batch(losses[:2], "sum") == 3
    share = torch.tensor([0.5, 0.5, 0.0], device=device)
    assert reduce_batch(losses, "mean", share) == 1.5
    assert reduce_batch(losses, "sum", share) == 3
