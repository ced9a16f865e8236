"""The type of small tensors."""

import pytest
import torch

from ggam_fast.precision import as_type, as_types, compute_dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_small_tensors_have_at_least_float32(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert compute_dtype(torch.empty(0, dtype=dtype)) == expected


def test_nothing_is_converted_twice() -> None:
    x = torch.rand(2)
    assert as_type(x, torch.float32) is x
    assert as_type(x, torch.bfloat16).dtype == torch.bfloat16
    same, none, other = as_types(torch.float32, x, None, x.double())
    assert same is x
    assert none is None
    assert other.dtype == torch.float32
