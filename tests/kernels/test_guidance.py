"""The guidance kernel's sums over images: weights in a mean, images that do not count, the whole loss."""

import pytest
import torch
from torch import Tensor

from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.kernels import guidance, plan

NAN = float("nan")
WEIGHT, OF_POSITIONS = 0.3, 2.5


def launch(
    e: Tensor, first: Tensor, ds: Tensor | None, mean: bool, scale: float, share: Tensor | None = None,
    ce: Tensor | None = None, sums: bool = False, positions: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """[beta, S, loss (N,), de, guidance (), total (), position ()]; what is not written stays NaN"""
    n, c = e.shape
    block, warps = plan.channels_block(c)
    rows = [torch.full(size, NAN, device=e.device) for size in ((n, c), (n, c), (n,), (n, c), (), (), ())]
    counter = torch.zeros((), dtype=torch.int32, device=e.device) if sums else None
    guidance.guidance_kernel[(n,)](
        e, first, None, None, None, ds, *rows[:4], scale, 1.0, share, counter, ce,
        rows[4] if sums else None, rows[5] if ce is not None else None,
        positions, None if positions is None else rows[6], OF_POSITIONS,
        C=c, L=4, STANDARDIZED=False, SOFTMAX=False, DIVERGENCE=0, MEAN=mean,
        BLOCK_C=block, BLOCK_L=4, num_warps=warps,
    )  # fmt: skip
    return rows


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize(("n", "with_ds"), [(1, False), (2, True), (7, False), (7, True), (131, False)])
def test_shares_and_sums(n: int, mean: bool, with_ds: bool, device: torch.device) -> None:
    c = 6
    e, first = torch.randn(n, c, device=device), torch.randn(n, c, device=device)
    ds = torch.randn(n, c, device=device) if with_ds else None
    counts = torch.arange(n, device=device) % 3 != 1
    share = counts / counts.sum()
    ce = torch.rand(n, device=device) * counts
    plain = launch(e, first, ds, mean, WEIGHT)
    # Every image of the batch alone counts as before, scaled.
    alone = launch(e, first, None, mean, WEIGHT)[3].double()
    scaled = alone * (share if mean else counts).unsqueeze(1)
    if ds is None:
        e[~counts] = NAN
    beta, s, losses, de, guided, total, unset = launch(e, first, ds, mean, WEIGHT, share, ce, True)
    assert torch.equal(beta, plain[0])
    assert torch.equal(s[counts], plain[1][counts])
    assert torch.equal(losses, torch.where(counts, plain[2], 0.0))
    torch.testing.assert_close(de.double(), plain[3] - alone + scaled, rtol=1e-5, atol=1e-6)
    exact = (losses.double() * (share if mean else 1.0)).sum()
    torch.testing.assert_close(guided.double(), exact, rtol=1e-6, atol=0)
    expected = (ce.double() * share).sum() + WEIGHT * exact
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    assert unset.isnan()
    of_positions = torch.rand(n, device=device) * counts
    *same, whole, position = launch(e, first, ds, mean, WEIGHT, share, ce, True, of_positions)
    assert all(map(torch.equal, same[2:], (losses, de, guided)))
    exact_position = (of_positions.double() * share).sum()
    torch.testing.assert_close(position.double(), exact_position, rtol=1e-6, atol=0)
    expected += OF_POSITIONS * exact_position
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=0)
    without = launch(e, first, ds, mean, WEIGHT, share, None, True)
    assert torch.equal(without[4], guided)
    assert without[5].isnan()


def test_no_image_counts(device: torch.device) -> None:
    nothing = torch.zeros(3, device=device)
    e = torch.full((3, 5), NAN, device=device)
    for mean in (True, False):
        first = torch.randn(3, 5, device=device)
        _, _, *rest = launch(e, first, None, mean, WEIGHT, nothing, nothing, True, nothing)
        assert not any(x.any() for x in rest)
