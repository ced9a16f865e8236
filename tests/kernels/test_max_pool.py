"""max_pool agrees with torch for ties, infinities and NaN, in any block of the map."""

import pytest
import torch

from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.backends.triton import TRITON

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [1, 17, 300, 520])
@pytest.mark.parametrize("weighted", [False, True])
def test_few_values(
    positions: int, dtype: torch.dtype, layout: str, weighted: bool, device: torch.device
) -> None:
    """Maxima that stand at many positions, some rows with NaN, some of infinities alone."""
    values = torch.tensor([[-INF, -1.0, 0.0, 2.0, NAN], [-INF, -1.0, 0.0, 2.0, INF]], device=device)
    a = values[0][torch.randint(4, (3, 40, positions), device=device)]
    a[1] = values[0][torch.randint(5, (40, positions), device=device)]
    a[2, :20] = values[1][torch.randint(5, (20, positions), device=device)]
    a[0, :10] = -INF
    a[0, 10:20] = torch.where(a[0, 10:20] == 2.0, -1.0, a[0, 10:20])
    a = a.to(dtype)
    if layout == "channels_last":
        a = a.transpose(1, 2).contiguous().transpose(1, 2)
    # Halves and doubles keep the ties; a zero makes NaN of an infinity, a negative weight turns the order.
    t = torch.tensor([1.0, 0.5, 2.0, -1.0, 0.0], device=device)[
        torch.randint(5, (3, positions), device=device)
    ]
    d = a.float() * t.unsqueeze(1) if weighted else a.float()
    peak, index = TRITON.max_pool(a, t if weighted else None)
    first = torch.where(d.isnan().any(2, keepdim=True), d.isnan(), d == d.amax(2, keepdim=True))
    assert torch.equal(index, first.int().argmax(2)), "the first of the maxima, or the first NaN"
    there = a.float().gather(2, index.unsqueeze(2)).squeeze(2)
    assert torch.equal(peak.nan_to_num(7.5, INF, -INF), there.nan_to_num(7.5, INF, -INF))
