"""Features in every layout and of odd sizes, and comparisons of results, for the tests of the stages.

On a GPU the compiled kernels run; elsewhere Triton's interpreter runs the same code, program by program.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

LAYOUTS = ("nchw", "channels_last", "sliced_nchw", "sliced_channels_last", "transposed")
SHAPES = [
    pytest.param(2, 5, 1, id="one position"),
    pytest.param(1, 1, 7, id="one channel"),
    pytest.param(3, 130, 49, id="C above a 128 tile; L of 7x7"),
    pytest.param(2, 33, 196, id="L of 14x14, not a multiple of 16"),
    pytest.param(1, 257, 200, id="C one above a partial sum"),
    pytest.param(1, 16, 256, id="exactly one tile"),
    pytest.param(1, 9, 257, id="L one above a tile"),
    pytest.param(1, 3, 1023, id="L one below a power of two"),
    pytest.param(0, 8, 4, id="empty batch"),
]
# More than one tile, part or sweep.
LARGE = [
    pytest.param(2, 1030, 5, id="C above eight parts of 128"),
    pytest.param(1, 5, 1025, id="L one above a row in one tile"),
    pytest.param(2, 3, 2050, id="nine tiles of a row"),
]
TOLERANCE = 2e-6  # relative: float32 accumulation of a few thousand terms


def make(n: int, c: int, l: int, device: torch.device, dtype: torch.dtype, layout: str) -> Tensor:
    """Random (N, C, L) features, some of them zero, in one of the memory layouts."""
    x = torch.randn(n + 1, c + 8, l + 8, device=device, dtype=torch.float32)
    x = torch.where(torch.rand_like(x) < 0.3, 0.0, x).to(dtype)
    if layout.startswith("sliced"):
        x = x[1:, 3 : c + 3, 5 : l + 5]  # not aligned, not dense
        return x if layout == "sliced_nchw" else _sliced_channels_last(x)
    x = x[1:, :c, :l].contiguous()
    if layout == "channels_last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "transposed":  # neither inner dimension is dense
        return torch.stack([x, x], -1)[..., 0]
    return x


def _sliced_channels_last(x: Tensor) -> Tensor:
    n, c, l = x.shape
    wide = torch.zeros(n, l, c + 3, device=x.device, dtype=x.dtype)
    wide[:, :, 2 : c + 2] = x.transpose(1, 2)
    return wide[:, :, 2 : c + 2].transpose(1, 2)


def weights(n: int, size: int, device: torch.device) -> Tensor:
    return torch.randn(n, size, device=device)


def check(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """||found - expected|| <= tolerance ||expected||, and every element written."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    error, norm = (found.double() - expected).norm(), expected.norm()
    assert error <= tolerance * norm.clamp_min(1e-30), f"relative error {error / norm:.2e}"


def cases(shapes: list[Any]) -> Iterator[Any]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for i, shape in enumerate(shapes):
        # Both native layouts for every shape; the other three and the types spread over them.
        for j, layout in enumerate(("nchw", "channels_last", LAYOUTS[2 + i % 3])):
            dtype = dtypes[(i + j) % 3]
            yield pytest.param(
                *shape.values, layout, dtype, id=f"{shape.id}-{layout}-{str(dtype).removeprefix('torch.')}"
            )


ALL = pytest.mark.parametrize(("n", "c", "l", "layout", "dtype"), list(cases(SHAPES)))
FUSED = pytest.mark.parametrize(("n", "c", "l", "layout", "dtype"), list(cases(SHAPES + LARGE)))
