"""Heat maps are those of the class asked for; insertion and deletion curves on a classifier known by hand."""

import pytest
import torch

from ggam_fast import GGAMHead
from ggam_fast.training.measure.faithfulness import area, deletion_curves, insertion_curves, ranks
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


def test_ranks_follow_the_heat_and_break_ties_at_random():
    heat = torch.tensor([[[0.0, 3.0], [2.0, 1.0]]])
    assert ranks(heat, torch.Generator().manual_seed(0)).tolist() == [[[3, 0], [1, 2]]]
    flat = ranks(torch.zeros(1, 8, 8), torch.Generator().manual_seed(0))
    assert sorted(flat.flatten().tolist()) == list(range(64))
    assert flat.flatten().tolist() != list(range(64))


def test_curves_of_a_classifier_that_sees_one_pixel():
    images = torch.zeros(2, 3, 16, 16)
    images[:, :, 4, 4] = 1.0

    def probability(shown):
        return shown[:, 0, 4, 4]

    hot, cold = torch.zeros(1, 16, 16), torch.ones(1, 16, 16)
    hot[0, 4, 4], cold[0, 4, 4] = 1, 0
    rank = ranks(torch.cat([hot, cold]), torch.Generator().manual_seed(0))
    gone = deletion_curves(probability, images, rank, 4)
    assert gone.tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert area(gone).tolist() == [0.125, 0.875]
    come = insertion_curves(probability, images, rank, 4)
    assert come[0, 0] == come[1, 0] < 0.1
    assert come[0, 1:].tolist() == [1] * 4
    assert come[1, 4] == 1
    assert come[1, 3] < 0.1
