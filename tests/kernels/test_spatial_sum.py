"""The pass that computes the mean clears the counters."""

import pytest
import torch

from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.kernels import plan, spatial_sum


@pytest.mark.parametrize("clear", [1, 127, 128, 129, 300])
def test_counters_are_cleared(clear: int, device: torch.device) -> None:
    a = torch.randn(2, 70, 50, device=device)
    cut = plan.spatial_sum(70, 50, 4, plan.POSITIONS_FIRST, 0)
    counters = torch.full((clear + 2,), 7, dtype=torch.int32, device=device)
    found = []
    for given in (counters[1:-1], None):
        out = torch.full((2, 70), float("nan"), device=device)
        spatial_sum.spatial_sum_kernel[(2 * plan.blocks(70, cut.task_c),)](
            a, None, None, out, None, 0.02, a.stride(0), given, clear, C=70, L=50, STRIDE_C=50, STRIDE_L=1,
            R=0, TASK_C=cut.task_c, BLOCK_C=cut.block_c, BLOCK_L=cut.block_l, STAGES=cut.stages,
            num_warps=cut.num_warps,
        )  # fmt: skip
        found.append(out)
    assert counters.tolist() == [7, *[0] * clear, 7]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], a.mean(2), rtol=1e-5, atol=1e-6)
