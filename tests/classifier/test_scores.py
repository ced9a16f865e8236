"""Scores and v of any module, by autograd."""

import pytest
import torch
from torch import nn

from ggam_fast import GGAMHead
from ggam_fast.classifier.scores import scores_by_autograd
from tests.parity import C, K, N, features, hard_target, relative_error

WIDTH = 7


@pytest.mark.parametrize("detach", [True, False])
def test_any_module_by_autograd(detach: bool, device: torch.device) -> None:
    module = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3), nn.GELU()).to(device, torch.float64)
    x = torch.randn(N, WIDTH, dtype=torch.float64, device=device, requires_grad=True)
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    result = scores_by_autograd(module, x, detach)
    seed = torch.randn_like(result.logits)
    (v,), _ = result.pull_back([seed])
    assert len(calls) == 1
    assert v.requires_grad == (not detach)
    assert relative_error(v, torch.autograd.grad(module(x), x, seed)[0]) < 1e-12
    result.logits.sum().backward()


@pytest.mark.parametrize("pool_type", ["avg", ""])
@pytest.mark.parametrize("training", [True, False])
def test_working_in_place_on_the_input_is_refused(
    pool_type: str, training: bool, device: torch.device
) -> None:
    """The gradient would be the one behind the first layer, silently."""
    own = nn.Sequential(nn.Hardtanh(-0.01, 0.05, inplace=True), nn.Flatten(), nn.LazyLinear(K))
    head = GGAMHead(C, K, pool_type=pool_type, classifier=own).to(device, torch.float64).train(training)
    x = features(device).requires_grad_()
    with torch.no_grad():
        head(x)
    for graph in (True, False):
        with (
            torch.set_grad_enabled(graph),
            pytest.raises(ValueError, match="classifier must not change its input in place"),
        ):
            head(x, hard_target(device))
    later = nn.Sequential(nn.Identity(), nn.LazyLinear(K), nn.Hardtanh(inplace=True))
    GGAMHead(C, K, classifier=later).to(device, torch.float64)(x, hard_target(device))
