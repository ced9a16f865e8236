"""One step of a classifier equals a step with the loss in two parts."""

import copy

import pytest
import torch

from ggam_fast.training.data.mixing import hard


@pytest.mark.parametrize("targets", ["labels", "mixed"])
@pytest.mark.parametrize("whole", [False, True], ids=["head", "classifier"])
@pytest.mark.parametrize("detach", [True, False], ids=["fused", "second order"])
def test_a_step_is_that_of_the_loss_in_two_parts(targets, whole, detach):
    import ggam_fast
    from ggam_fast.training.model.backbones import create_backbone
    from ggam_fast.training.model.classifier import GGAMClassifier, GuidedLoss

    torch.manual_seed(0)
    backbone = create_backbone("test_resnet", pretrained=False, image_size=64)
    head = ggam_fast.GGAMHead(
        backbone.num_features, 3, hidden_size=8, rd_channels=4, cam_detach=detach, cam_norm="standardized"
    )
    model = GGAMClassifier(backbone, head) if whole else head
    twin = copy.deepcopy(model)
    inputs = torch.randn(6, 3, 64, 64) if whole else torch.randn(6, backbone.num_features, 2, 2).relu()
    labels = torch.arange(6) % 3
    target = torch.rand(6, 3).softmax(1) if targets == "mixed" else labels

    step = GuidedLoss(model, 0.5, 0.1, torch.device("cpu"), torch.float32)
    loss, numbers = step(inputs, target)
    loss.backward()
    out = twin(inputs, target)
    expected = ggam_fast.GGAMLoss(0.5, label_smoothing=0.1)(out, target)
    expected.backward()
    right = (out.logits.argmax(1) == hard(target)).float().mean()
    torch.testing.assert_close(numbers, torch.stack([expected, out.guidance_loss, right]).detach())
    assert not numbers.requires_grad
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("targets", ["labels", "mixed"])
def test_classes_are_weighted_in_the_cross_entropy_alone(targets):
    import ggam_fast
    from ggam_fast.training.model.classifier import GuidedLoss

    torch.manual_seed(0)
    head = ggam_fast.GGAMHead(8, 3, hidden_size=0, rd_channels=4, cam_norm="standardized")
    features, labels = torch.randn(6, 8, 2, 2).relu(), torch.arange(6) % 3
    target = torch.rand(6, 3).softmax(1) if targets == "mixed" else labels
    weights = torch.tensor([0.5, 1.0, 4.0])
    loss, numbers = GuidedLoss(head, 0.5, 0.1, torch.device("cpu"), torch.float32, weights)(features, target)
    out = head(features, target)
    entropy = torch.nn.functional.cross_entropy(out.logits, target, weights, label_smoothing=0.1)
    torch.testing.assert_close(loss, entropy + 0.5 * out.guidance_loss)
    assert numbers[1].item() == pytest.approx(out.guidance_loss.item())
    assert not numbers.requires_grad


def test_the_position_loss_is_a_fourth_number():
    import ggam_fast
    from ggam_fast.training.model.classifier import GuidedLoss

    head = ggam_fast.GGAMHead(16, 3, hidden_size=0, position_guidance="relu")
    features, labels = torch.randn(6, 16, 2, 2).relu(), torch.arange(6) % 3
    loss, numbers = GuidedLoss(head, 0.5, 0.0, torch.device("cpu"), torch.float32, position_weight=3.0)(
        features, labels
    )
    out = head(features, labels)
    torch.testing.assert_close(numbers[3], out.position_loss.detach())
    torch.testing.assert_close(loss, ggam_fast.GGAMLoss(0.5, position_weight=3.0)(out, labels))


def test_the_default_guidance_has_one_order_with_the_cross_entropy():
    import ggam_fast
    from ggam_fast.training.config.options import HeadConfig, OptimConfig

    head = ggam_fast.GGAMHead(2048, 200, **HeadConfig().keywords())
    labels = torch.randint(200, (32,))
    out = head(torch.randn(32, 2048, 7, 7).relu(), labels)
    entropy = torch.nn.functional.cross_entropy(out.logits, labels)
    guidance = OptimConfig().guidance_weight * out.guidance_loss
    of_entropy, of_guidance = (
        torch.autograd.grad(part, head.fc2.weight, retain_graph=True)[0].norm()
        for part in (entropy, guidance)
    )
    assert 0.1 < float((guidance / entropy).detach()) < 10
    assert float(of_guidance / of_entropy) <= 3
