"""The statistics of S, T and beta agree with minima and maps that autograd and an optimizer find."""

import pytest
import torch
from scipy import optimize

from ggam_fast import GGAMHead
from ggam_fast.guidance import kl_guidance
from ggam_fast.training.ablation.mechanism import class_map, correlation, statistics_of
from ggam_fast.training.data.batches import MapBatches


@pytest.mark.parametrize("divergence", ["symmetric", "forward", "reverse"])
@pytest.mark.parametrize("cam_norm", ["sigmoid", "softmax", "standardized", "standardized_softmax"])
def test_the_floor_is_the_least_that_any_attention_reaches(cam_norm, divergence):
    torch.manual_seed(0)
    head = GGAMHead(16, 3, hidden_size=0, cam_norm=cam_norm, divergence=divergence)
    features, labels = torch.randn(1, 16, 3, 3) * 100, torch.tensor([1])
    found = statistics_of(head, MapBatches(features, labels, 1, torch.device("cpu")))
    out = head.eval()(features, labels)
    beta = out.cam_weights.detach().double()

    def loss(x):
        log_s = torch.log_softmax(torch.as_tensor(x)[None], 1)
        return kl_guidance(log_s, beta, cam_norm, 1.0, divergence).item()

    least = optimize.minimize(loss, torch.zeros(16).double().numpy(), tol=1e-12).fun
    assert found["floor"] == pytest.approx(least, abs=1e-6)
    assert found["guidance"] == pytest.approx(out.guidance_loss.item(), rel=1e-5, abs=1e-6)
    assert found["guidance"] > found["floor"] - 1e-9
    assert found["median"] == pytest.approx(beta.abs().median().item())


def test_the_class_map_is_the_gradient_of_t():
    torch.manual_seed(0)
    head = GGAMHead(6, 3, rd_channels=2, hidden_size=4).eval()
    features, labels = torch.rand(2, 6, 3, 4), torch.tensor([1, 2])
    with torch.no_grad():
        t = head(features, labels).spatial_attention
        found = class_map(head, features, labels)
    t.requires_grad_()
    pooled = (features * t[:, None]).sum((2, 3))  # kappa / L is 1 for a T that sums to 1
    score = head.classifier(pooled).gather(1, labels[:, None]).sum()
    (expected,) = torch.autograd.grad(score, t)
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())
    assert correlation(found.flatten(1), expected.flatten(1)).allclose(torch.ones(2))


def test_entropy_of_attention_that_is_not_there_is_that_of_a_uniform_map():
    batches = MapBatches(torch.rand(4, 6, 3, 3), torch.tensor([0, 1, 2, 0]), 2, torch.device("cpu"))
    torch.manual_seed(0)
    found = statistics_of(GGAMHead(6, 3, attention="none", hidden_size=0), batches)
    assert found["s_entropy"] == pytest.approx(1)
    assert found["t_entropy"] == pytest.approx(1)
    assert found["t_class_map"] == 0
    guided = statistics_of(GGAMHead(6, 3, attention="spatial", hidden_size=0), batches)
    assert guided["t_entropy"] < 1
