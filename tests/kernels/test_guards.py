"""No kernel reads or writes a byte outside its tensors.

Each tensor lies between two bands of bytes.  Triton's interpreter tells the addresses that a kernel uses, and
none may lie in a band.  Afterwards the bands must be as before, atomic additions included.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.trace import Access, elements, needs_interpreter, traced

pytest.importorskip("triton")

from bench.tools import every_kernel
from ggam_fast.backends.triton import TRITON, launch

pytestmark = needs_interpreter
BAND, BYTE = 512, 0xFF  # as a float, NaN


class BandedTorch:
    """torch, but what it allocates lies between bands."""

    def __init__(self) -> None:
        self.memory: list[Tensor] = []
        self.tensors: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        size = shape.numel() * dtype.itemsize
        self.memory.append(torch.full((BAND + size + BAND,), BYTE, dtype=torch.uint8))
        self.tensors.append(self.memory[-1][BAND : BAND + size].view(dtype).view(shape))
        return self.tensors[-1]

    def rand(self, *shape: Any, **options: Any) -> Tensor:
        return self.empty(*shape, **options).uniform_()

    def zeros(self, *shape: Any, **options: Any) -> Tensor:
        return self.empty(*shape, **options).zero_()

    def banded(self, x: Tensor) -> Tensor:
        """x in the same order of memory."""
        if x.transpose(1, 2).is_contiguous():
            return self.banded(x.transpose(1, 2)).transpose(1, 2)
        return self.empty(x.shape, dtype=x.dtype).copy_(x)

    def outside(self, accesses: list[Access]) -> np.ndarray:
        """Accessed addresses that are no element of a tensor."""
        used = np.unique(np.concatenate([a.addresses for a in accesses]))
        return used[~np.isin(used, np.concatenate([elements(x).ravel() for x in self.tensors]))]

    def spoilt(self) -> int:
        """How many bands were written to."""
        return sum(bool((band != BYTE).any()) for x in self.memory for band in (x[:BAND], x[-BAND:]))


def products(new: Callable[..., Tensor]) -> None:
    """Small ones: `every_kernel` has products that take the interpreter minutes."""
    for rows, k, j in ((3, 35, 5), (17, 18, 33)):
        x, w, b, odd = new(rows, k), new(j, k), new(j), new(rows, 5)
        (y,) = TRITON.product([x], w.t(), b, relu=True)
        TRITON.product([y, y], w)
        TRITON.product([y], w, mask=x)
        TRITON.layer_grads([(y, x), (odd, y)], b[0])


def long_rows(new: Callable[..., Tensor]) -> None:
    """Maps of more positions than a tile."""
    a, s, t, total = new(2, 3, 4100), new(2, 3), new(2, 4100), new(2)
    for norm in ("softmax", "sum", "sigmoid"):
        TRITON.spatial_attention(a, s, norm, 7)
        TRITON.spatial_attention_grad(a, s, 1.0, t, t, total, norm)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bands(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    banded = BandedTorch()
    a = torch.randn(2, 35, 21).bfloat16()
    if layout == "channels_last":
        a = a.transpose(1, 2).contiguous().transpose(1, 2)
    monkeypatch.setattr(every_kernel, "torch", banded)
    monkeypatch.setattr(every_kernel, "launch_products", lambda s, new: products(new))
    monkeypatch.setattr(every_kernel, "CLASSES", (7, 4100))
    monkeypatch.setattr(every_kernel, "ODD_WIDTH", 3)
    with traced() as trace:
        monkeypatch.setattr(launch, "torch", banded)
        every_kernel.launch_all(banded.banded(a), random=True)
        long_rows(banded.rand)
    assert len(banded.tensors) > 500
    assert len(banded.outside(trace.loads)) == 0
    assert len(banded.outside(trace.stores)) == 0
    assert banded.spoilt() == 0
