"""The softmax over channels and its gradient against float64."""

import pytest
import torch
from torch import Tensor

from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.kernels import plan, softmax

INF, NAN = float("inf"), float("nan")


def geometry(channels: int) -> dict[str, int]:
    block, warps = plan.channels_block(channels)
    return {"C": channels, "BLOCK_C": block, "num_warps": warps}


def guarded(n: int, c: int, device: torch.device) -> Tensor:
    return torch.full((n + 2, c), NAN, device=device)[1:-1]


def softmax_of(e: Tensor) -> Tensor:
    n, c = e.shape
    s = guarded(n, c, e.device)
    softmax.softmax_kernel[(n,)](e, s, **geometry(c))
    assert s._base[[0, -1]].isnan().all()
    return s


@pytest.mark.parametrize("c", [1, 7, 127, 128, 129, 1000, 8192])
@pytest.mark.parametrize(("extra", "scale"), [(False, None), (True, None), (True, -0.7)])
def test_against_float64(c: int, extra: bool, scale: float | None, device: torch.device) -> None:
    e, ds, more = (torch.randn(3, c, device=device) for _ in range(3))
    e *= 5.0
    leaf = e.double().requires_grad_()
    expected = torch.softmax(leaf, 1)
    (de,) = torch.autograd.grad(expected, leaf, ds.double())
    s = softmax_of(e)
    assert (s.double() - expected).norm() <= 1e-6 * expected.norm()
    found = guarded(3, c, device)
    given = None if scale is None else torch.tensor(scale, device=device)
    softmax.softmax_grad_kernel[(3,)](s, ds, more if extra else None, given, found, **geometry(c))
    assert found._base[[0, -1]].isnan().all()
    if extra:
        de = de + more.double() * (1.0 if scale is None else scale)
    terms = (expected.detach() * ds.double()).norm()  # of which de is what is left
    assert (found.double() - de).norm() <= 1e-6 * (de.norm() + terms)


def test_extremes(device: torch.device) -> None:
    e = torch.tensor([[-1e30, 0.0, -1e30], [3e38, 3e38, -3e38], [1e4, 1e4 - 1.0, -INF], [-1e30] * 3,
                      [NAN, 0.0, 1.0], [0.0, 0.0, 0.0]], device=device)  # fmt: skip
    found = softmax_of(e)
    expected = torch.softmax(e.double(), 1)
    assert found[4].isnan().all(), "and no other row has one"
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0.0, equal_nan=True)
