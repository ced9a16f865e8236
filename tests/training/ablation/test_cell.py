"""The statistics of beta agree with a minimum that an optimizer finds."""

import pytest
import torch
from scipy import optimize

from ggam_fast import GGAMHead
from ggam_fast.guidance import kl_guidance
from ggam_fast.training.ablation.cell import beta_statistics
from ggam_fast.training.data.batches import MapBatches


@pytest.mark.parametrize("divergence", ["symmetric", "forward"])
@pytest.mark.parametrize("cam_norm", ["sigmoid", "softmax", "standardized"])
def test_the_floor_is_the_least_that_any_attention_reaches(cam_norm, divergence):
    torch.manual_seed(0)
    head = GGAMHead(16, 3, hidden_size=0, cam_norm=cam_norm, divergence=divergence)
    features, labels = torch.randn(1, 16, 3, 3) * 100, torch.tensor([1])
    found = beta_statistics(head, MapBatches(features, labels, 1, torch.device("cpu")))
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
