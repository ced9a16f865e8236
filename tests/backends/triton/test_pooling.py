"""The other poolings of A, against float64 formulas on the same (upcast) inputs."""

import pytest
import torch

from .cases import ALL, check, make, weights  # first: it skips without triton

from ggam_fast.backends.triton import TRITON as S  # isort: skip
from ggam_fast.backends.triton import pooling  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@ALL
@pytest.mark.parametrize("weighted", [True, False])
def test_max_pool_and_scatter(
    n: int, c: int, l: int, layout: str, dtype: torch.dtype, weighted: bool, device: torch.device
) -> None:
    a, t = make(n, c, l, device, dtype, layout), weights(n, l, device).abs()
    d = a.float() * t.unsqueeze(1) if weighted else a.float()  # the kernel's own product: no new ties
    peak, index = S.max_pool(a, t if weighted else None)
    assert torch.equal(index, d.max(2).indices)
    assert torch.equal(peak, a.float().gather(2, index.unsqueeze(2)).squeeze(2))

    x = weights(n, c, device)
    check(S.position_scatter(x, index, l), x.double().new_zeros(n, l).scatter_add(1, index, x.double()))


def test_max_pool_ties_nans_and_infinities(device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[1, 3, 3, 2], [nan, 1, nan, inf], [-inf] * 4, [0, inf, 2, inf], [-2, -1, nan, 9], [0, 0, 0, 0]]
    a = torch.tensor([rows], device=device)
    for layout in (a, a.transpose(1, 2).contiguous().transpose(1, 2)):
        peak, index = S.max_pool(layout, None)
        assert index.tolist() == [[1, 0, 0, 1, 2, 0]]
        assert torch.equal(
            peak.nan_to_num(7), torch.tensor([[3, 7, -inf, inf, 7, 0]], device=device).nan_to_num(7)
        )


@ALL
def test_attended_map(n: int, c: int, l: int, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    a, t, s = make(n, c, l, device, dtype, layout), weights(n, l, device), weights(n, c, device)
    by_position, by_channel = a.double() * t.double().unsqueeze(1), a.double() * s.double().unsqueeze(2)
    eps = torch.finfo(dtype).eps
    for given, expected in ((t, by_position), (None, by_channel)):
        kept = S.hadamard(a, given, s, False)
        assert kept.dtype == dtype
        check(kept, expected, eps)
        flat = S.hadamard(a, given, s, True)
        assert flat.dtype == torch.float32
        assert flat.is_contiguous()
        check(flat, expected)
        check(pooling.attended_map(a, given, s, 0.3, True), 0.3 * expected)


@ALL
@pytest.mark.parametrize("kappa", [1, 7])
def test_multiply(
    n: int, c: int, l: int, layout: str, dtype: torch.dtype, kappa: int, device: torch.device
) -> None:
    x, y = weights(n, c, device), weights(n, c, device)
    check(S.multiply(x, y, kappa), kappa * x.double() * y.double())


@ALL
def test_grad_cam_means(
    n: int, c: int, l: int, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    a, t = make(n, c, l, device, dtype, layout), weights(n, l, device)
    dense = make(n, c, l, device, torch.float32, "channels_last")  # another layout and type than A
    expanded = torch.randn(n, c, 1, device=device).expand(n, c, l)  # stride 0, as .mean().backward() gives
    for g in (dense, expanded):
        means, dots, partials = S.grad_cam_means(a, g, t)
        check(means, torch.einsum("ncl,nl->nc", g.double(), t.double()) / l, 5e-6)
        check(dots, (a.double() * g.double()).sum(2), 5e-6)
        check(partials.sum(1), (a.double() * g.double()).sum(1), 5e-6)
        check(S.grad_cam_means(a, g, None)[0], g.double().mean(2), 5e-6)
