"""Addresses past 2^31 elements agree with Python's integers.  No tensor of that size is allocated."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ggam_fast import checks
from tests.kernels.trace import Access, elements, needs_interpreter, traced

pytestmark = needs_interpreter
if checks.TRITON_AVAILABLE:
    from ggam_fast.kernels import (
        channel_sum,
        features_grad,
        grad_cam_means,
        hadamard,
        max_pool,
        spatial_sum,
    )

# (stride of images, of channels, of positions): a batch past 2^31, and single images of (C, N, L) and
# (L, N, C) memory whose last element lies past it.
STRIDES = {
    "batch": (2**31 + 2**20, 49, 1),
    "channels apart": (49, 2**28 + 49, 1),
    "positions apart": (40, 1, 2**26),
}
N, C, L = 2, 40, 49


def expected(strides: tuple[int, int, int], base: Tensor) -> np.ndarray:
    n, c, l = (np.arange(size, dtype=np.int64) for size in (N, C, L))
    offsets = n[:, None, None] * strides[0] + c[:, None] * strides[1] + l * strides[2]
    return np.sort((offsets * base.element_size() + base.data_ptr()).ravel())


def apart(accesses: list[Access], small: list[Tensor]) -> np.ndarray:
    """The addresses that are of no small tensor."""
    addresses = np.concatenate([a.addresses for a in accesses])
    return np.sort(addresses[~np.isin(addresses, np.concatenate([elements(t).ravel() for t in small]))])


@pytest.mark.parametrize("strides", list(STRIDES.values()), ids=list(STRIDES))
def test_loads(strides: tuple[int, int, int]) -> None:
    a = torch.zeros(N * C * L)
    t, s, out = torch.zeros(N, L), torch.zeros(N, C), torch.zeros(N * C * L)
    index = torch.zeros(N, C, dtype=torch.int64)
    geometry = {"C": C, "L": L, "STRIDE_C": strides[1], "STRIDE_L": strides[2]}
    tile = {"BLOCK_C": 32, "BLOCK_L": 64}
    launches = {
        "spatial_sum": lambda: spatial_sum.spatial_sum_kernel[(2 * N,)](
            a, t, t, out, out, 1.0, strides[0], None, 0, R=2, TASK_C=32, STAGES=1, **geometry, **tile),
        "channel_sum": lambda: channel_sum.channel_sum_kernel[(N,)](
            a, s, s, out, strides[0], R=2, PARTIAL_C=64, STAGES=1, **geometry, **tile),
        "hadamard": lambda: hadamard.hadamard_kernel[(2 * N,)](
            a, t, out, 1.0, strides[0], C * L, OUT_STRIDE_C=L, OUT_STRIDE_L=1, BY_CHANNEL=False,
            **geometry, **tile),
        "max_pool": lambda: max_pool.max_pool_kernel[(2 * N,)](
            a, t, out, index, strides[0], **geometry, **tile),
        "features_grad": lambda: features_grad.features_grad_kernel[(2 * N,)](
            out, a, None, None, t, t, s, s, None, C * L, strides[0], C=C, L=L, OUT_STRIDE_C=L,
            OUT_STRIDE_L=1, GRAD_STRIDE_C=strides[1], GRAD_STRIDE_L=strides[2], POOL=2, **tile),
    }  # fmt: skip
    for name, launch in launches.items():
        with traced(execute=False) as trace:
            launch()
        found = apart(trace.loads, [t, s])
        if name == "max_pool":  # each channel's maximum is looked up again: position 0 of zeros
            assert len(found) == N * C * (L + 1), name
            found = np.unique(found)
        assert np.array_equal(found, expected(strides, a)), name


@pytest.mark.parametrize("strides", list(STRIDES.values()), ids=list(STRIDES))
def test_two_maps(strides: tuple[int, int, int]) -> None:
    a, g = torch.zeros(N * C * L), torch.zeros(N * C * L, dtype=torch.bfloat16)
    t, out = torch.zeros(N, L), torch.zeros(N * C * L)
    with traced(execute=False) as trace:
        grad_cam_means.grad_cam_means_kernel[(2 * N,)](
            a, g, t, out, out, out, strides[0], strides[0], C=C, L=L, STRIDE_C=strides[1],
            STRIDE_L=strides[2], GRAD_STRIDE_C=strides[1], GRAD_STRIDE_L=strides[2], BLOCK_C=32, BLOCK_L=64,
        )  # fmt: skip
    both = np.sort(np.concatenate([expected(strides, a), expected(strides, g)]))
    assert np.array_equal(apart(trace.loads, [t]), both)


@pytest.mark.parametrize("strides", list(STRIDES.values()), ids=list(STRIDES))
def test_stores(strides: tuple[int, int, int]) -> None:
    out, a = torch.zeros(N * C * L), torch.zeros(N, C, L)
    t, s = torch.zeros(N, L), torch.zeros(N, C)
    tile = {
        "C": C,
        "L": L,
        "OUT_STRIDE_C": strides[1],
        "OUT_STRIDE_L": strides[2],
        "BLOCK_C": 32,
        "BLOCK_L": 64,
    }
    with traced(execute=False) as trace:
        hadamard.hadamard_kernel[(2 * N,)](
            a, s, out, 1.0, C * L, strides[0], STRIDE_C=L, STRIDE_L=1, BY_CHANNEL=True, **tile
        )
    assert np.array_equal(apart(trace.stores, [a]), expected(strides, out))
    with traced(execute=False) as trace:
        features_grad.features_grad_kernel[(2 * N,)](
            out, None, s, None, t, t, s, s, None, strides[0], 0, GRAD_STRIDE_C=0, GRAD_STRIDE_L=0, POOL=0,
            **tile,
        )  # fmt: skip
    assert np.array_equal(apart(trace.stores, [a]), expected(strides, out))
