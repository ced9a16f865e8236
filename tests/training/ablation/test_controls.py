"""Controls guide T by the maps that they name."""

import pytest
import torch

from ggam_fast import GGAMHead
from ggam_fast.functional import channel_sum, position_loss
from ggam_fast.training.ablation.controls import ControlLoss, control_map


@pytest.fixture
def features():
    return torch.rand(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))


def test_the_maps(features):
    weights = torch.rand(3, 4)
    assert torch.equal(control_map("mean_activation", features, weights), features.mean(1))
    own = channel_sum(features, weights)
    assert torch.equal(control_map("other_image", features, weights), own[[2, 0, 1]])
    gaussian = control_map("gaussian", features, weights)
    assert gaussian.shape == (3, 5, 6)
    assert gaussian.flip(1, 2).allclose(gaussian)
    assert gaussian[0].argmax() == 2 * 6 + 2


@pytest.mark.parametrize("control", ["mean_activation", "other_image", "gaussian"])
def test_the_loss_pulls_t_towards_the_map(control, features):
    torch.manual_seed(0)
    head = GGAMHead(4, 3, rd_channels=2, attention="spatial", hidden_size=0, cam_at="attended")
    labels = torch.tensor([0, 1, 2])
    a = features.clone().requires_grad_()
    out = head(a, labels)
    q = control_map(control, features, out.cam_weights)
    before = position_loss(out.spatial_attention, q)
    loss_of = ControlLoss(head, control, 1e5, torch.device("cpu"), torch.float32)
    loss, (total, positions, accuracy) = loss_of(a, labels)
    assert positions == pytest.approx(before.item(), rel=1e-4)
    assert total == loss
    assert 0 <= accuracy <= 1
    (grad,) = torch.autograd.grad(loss, a)
    after = position_loss(head(a - 0.1 * grad / grad.norm(), labels).spatial_attention, q)
    assert after < before
