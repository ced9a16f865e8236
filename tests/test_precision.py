"""The type of small tensors, and autocast kept away from them."""

import pytest
import torch

from ggam_fast.precision import as_type, autocasts, compute_dtype, full_precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_small_tensors_have_at_least_float32(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert compute_dtype(torch.empty(0, dtype=dtype)) == expected


def test_nothing_is_converted_twice() -> None:
    x = torch.rand(2)
    assert as_type(x, torch.float32) is x
    assert as_type(x, torch.bfloat16).dtype == torch.bfloat16


def test_autocast_is_off_inside(device: torch.device) -> None:
    x = torch.rand(2, 2, device=device)
    assert not autocasts(x)
    with torch.autocast(device.type, torch.bfloat16):
        assert autocasts(x)
        assert not autocasts(x.to("meta"))
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x):
            assert (x @ x).dtype == torch.float32
