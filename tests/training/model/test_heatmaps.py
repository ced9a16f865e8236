"""Heat maps are those of the requested class."""

import pytest
import torch

from ggam_fast import GGAMHead
from ggam_fast.training.model.heatmaps import heat_maps


def head_and_features(**options):
    torch.manual_seed(0)
    head = GGAMHead(32, 3, hidden_size=0, **options).eval()
    return head, torch.randn(4, 32, 5, 6)


@pytest.mark.parametrize("cam_at", ["features", "attended"])
def test_grad_cam_is_the_gradient_of_the_class_asked_for(cam_at):
    head, features = head_and_features(cam_at=cam_at, cam_class="predicted")
    classes = torch.tensor([2, 0, 1, 1])
    found = heat_maps(head, features, classes)
    assert head.cam_class == "predicted"
    at = features.clone().requires_grad_()
    attention = head(features, classes).spatial_attention.detach()
    if cam_at == "attended":
        at = (features * attention[:, None]).requires_grad_()
        scores = head.classifier(at.mean((2, 3)))
    else:
        scores = head(at)
    (grad,) = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), at)
    expected = (grad.mean((2, 3), keepdim=True) * at).sum(1).relu()
    torch.testing.assert_close(found.grad_cam, expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.attention, attention)


def test_the_predicted_class_is_the_default():
    head, features = head_and_features()
    found = heat_maps(head, features)
    assert found.classes.equal(head(features).argmax(1))
    assert found.grad_cam.equal(heat_maps(head, features, found.classes).grad_cam)


@pytest.mark.parametrize("attention", ["none", "channel"])
def test_a_head_without_spatial_attention_has_no_such_map(attention):
    head, features = head_and_features(attention=attention)
    assert heat_maps(head, features).attention is None
