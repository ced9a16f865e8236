"""FlopCounterMode counts the kernels' operators as it counts the torch backend's own operations."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ggam_fast import GGAMHead, GGAMLoss, checks
from ggam_fast.functional import channel_sum, fused_ggam_loss, grad_cam_means, spatial_sum
from ggam_fast.reference import GGAMHeadReference
from tests.parity import OPTIONS, C, K, N, features, hard_target

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

CASES: list[dict[str, Any]] = [
    {"attention": attention, "pool_type": pool_type, "cam_at": cam_at}
    for attention in OPTIONS["attention"]
    for pool_type in ("avg", "max")
    for cam_at in OPTIONS["cam_at"]
]
CASES += [{"cam_detach": False, "hidden_size": 0}, {"spatial_norm": "sum"}, {"spatial_norm": "sigmoid"}]
CASES += [
    {"position_guidance": "relu", "attention": attention, "cam_at": cam_at}
    for attention in ("channel_spatial", "spatial")
    for cam_at in OPTIONS["cam_at"]
]


def flops(function: Any, *arguments: Any) -> int:
    """What torch's counter counts."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_step_counts_as_on_the_torch_backend(options: dict[str, Any], device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("on a GPU the torch backend writes dA elementwise")
    target = hard_target(device)
    counts = []
    for backend in ("torch", "triton"):
        head = GGAMHead(C, K, backend=backend, device=device, **{"hidden_size": 8, **options})
        x = features(device).float().requires_grad_()

        def guided(head: GGAMHead = head, x: Tensor = x) -> None:
            GGAMLoss(0.5)(head(x, target), target).backward()

        def fused(head: GGAMHead = head, x: Tensor = x) -> None:
            fused_ggam_loss(head, x, target).loss.backward()

        counts.append([flops(head, x), flops(guided), flops(fused)])
    assert counts[1] == counts[0]
    assert all(counts[1])


def test_contractions(device: torch.device) -> None:
    x = features(device).float()
    _, _, height, width = x.shape
    for backend in ("torch", "triton"):
        for function, weights in ((channel_sum, x[:, :, 0, 0]), (spatial_sum, x[:, 0])):
            found = flops(lambda f=function, w=weights, b=backend: f(x, w, backend=b))
            assert found == 2 * N * C * height * width
        assert flops(lambda b=backend: grad_cam_means(x, x, backend=b)) == 0


def test_the_reference_has_no_product_for_the_contractions(device: torch.device) -> None:
    """Which is why it counts less: its contractions are elementwise products and sums."""
    x = features(device).float()
    head, reference = (kind(C, K, hidden_size=0, device=device) for kind in (GGAMHead, GGAMHeadReference))
    assert flops(head, x) == flops(reference, x) + 2 * 2 * x.numel()
