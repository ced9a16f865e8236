"""Statistics of batch norm are those of the present weights, wherever they started."""

import pytest
import torch
from torch import nn

from ggam_fast.norm import SettlingBatchNorm1d
from ggam_fast.training.model.batch_statistics import estimated, settled

BATCHES = [(4 * torch.randn(64, 3, generator=torch.Generator().manual_seed(n)) + 7, None) for n in range(8)]


@pytest.mark.parametrize(
    ("norm", "needed"),
    [
        (nn.BatchNorm1d(3), 44),  # 0.9^44 = 0.0097
        (nn.BatchNorm1d(3, momentum=0.01), 459),
        (SettlingBatchNorm1d(3), 10),
        (nn.BatchNorm1d(3, momentum=None), 0),
        (nn.BatchNorm1d(3, track_running_stats=False), 0),
        (nn.LayerNorm(3), 0),
    ],
)
def test_first_values_have_to_be_gone(norm, needed):
    module = nn.Sequential(nn.Linear(3, 3), norm)
    assert settled(module, needed)
    assert not needed or not settled(module, needed - 1)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, SettlingBatchNorm1d])
def test_estimated_statistics_are_those_of_the_batches(norm):
    module = nn.Sequential(norm(3), nn.Dropout(0.5)).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(5)
    found = estimated(module, BATCHES)
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    means = torch.stack([x.mean(0) for x, _ in BATCHES]).mean(0)
    variances = torch.stack([x.var(0) for x, _ in BATCHES]).mean(0)
    torch.testing.assert_close(found[0].running_mean, means)
    torch.testing.assert_close(found[0].running_var, variances)
    assert found[0].momentum == 0.1
    assert not found.training
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
