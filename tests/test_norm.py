"""SettlingBatchNorm1d: torch's batch norm, with running statistics that follow its equation."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ggam_fast.norm import SettlingBatchNorm1d

C = 5


def batches(count: int, device: torch.device, *positions: int) -> list[Tensor]:
    return [3 * torch.randn(7, C, *positions, dtype=torch.float64, device=device) + 2 for _ in range(count)]


@pytest.mark.parametrize("positions", [(), (4,)])
@pytest.mark.parametrize("momentum", [0.1, 0.3, 1.0])
def test_running_statistics_are_the_equation(
    momentum: float, positions: tuple[int, ...], device: torch.device
) -> None:
    norm = SettlingBatchNorm1d(C, momentum=momentum).to(device, torch.float64)
    mean, variance = torch.zeros(C).to(norm.running_mean), torch.ones(C).to(norm.running_mean)
    for seen, x in enumerate(batches(30, device, *positions), 1):
        flat = x.transpose(0, 1).flatten(1)
        f = max(momentum, 1 / seen)
        mean, variance = (1 - f) * mean + f * flat.mean(1), (1 - f) * variance + f * flat.var(1)
        norm(x)
        assert_close(norm.running_mean, mean)
        assert_close(norm.running_var, variance)
        assert norm.num_batches_tracked == seen
    assert_close(norm.eval()(x), nn.functional.batch_norm(x, mean, variance, eps=norm.eps))


def test_the_first_batch_takes_the_place_of_zero_and_one(device: torch.device) -> None:
    norm = SettlingBatchNorm1d(C).to(device, torch.float64)
    (x,) = batches(1, device)
    norm(1e-3 * x)
    assert_close(norm.running_mean, 1e-3 * x.mean(0))
    assert_close(norm.running_var, 1e-6 * x.var(0))


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_the_rest_is_torchs(options: dict[str, object], training: bool, device: torch.device) -> None:
    """Output, gradients, and the statistics where torch itself averages all batches or keeps none."""
    theirs = nn.BatchNorm1d(C, eps=0.1, **options).to(device, torch.float64)  # type: ignore[arg-type]
    ours = SettlingBatchNorm1d(C, eps=0.1, **options).to(device, torch.float64)  # type: ignore[arg-type]
    ours.load_state_dict(theirs.state_dict())
    for x in batches(5, device):
        found = []
        for norm in (ours.train(training), theirs.train(training)):
            leaf = x.clone().requires_grad_()
            y = norm(leaf)
            found.append([y, *torch.autograd.grad(y.sin().sum(), [leaf, *norm.parameters()])])
        assert_close(*found)
        if "affine" not in options:
            assert_close(ours.state_dict(), theirs.state_dict())


def test_state_dict_is_torchs(device: torch.device) -> None:
    ours, theirs = (
        SettlingBatchNorm1d(C).to(device, torch.float64),
        nn.BatchNorm1d(C).to(device, torch.float64),
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    xs = batches(40, device)
    for x in xs[:20]:
        ours(x)
    theirs.load_state_dict(ours.state_dict())
    for x in xs[20:]:  # from here on both are the exponential average
        ours(x), theirs(x)
    assert_close(ours.state_dict(), theirs.state_dict())
    ours.load_state_dict(nn.BatchNorm1d(C).to(device, torch.float64).state_dict())
    assert ours.num_batches_tracked == 0


def test_one_image_has_no_statistics_and_moves_none(device: torch.device) -> None:
    norm = SettlingBatchNorm1d(C).to(device, torch.float64)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(batches(1, device)[0][:1])
    assert_close(norm.state_dict(), before)
    with pytest.raises(ValueError, match="2D or 3D"):
        norm(torch.randn(2, C, 3, 3, dtype=torch.float64, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_statistics(dtype: torch.dtype, device: torch.device) -> None:
    norm, exact = SettlingBatchNorm1d(C).to(device, dtype), SettlingBatchNorm1d(C).to(device, torch.float64)
    for x in batches(3, device):
        norm(x.to(dtype)), exact(x.to(dtype).double())
    assert norm.running_var.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(norm.running_mean.double(), exact.running_mean, rtol=4 * eps, atol=4 * eps)
    assert_close(norm.running_var.double(), exact.running_var, rtol=4 * eps, atol=0)
