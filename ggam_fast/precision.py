"""The type of the small tensors, and conversions to it."""

from typing import Any

import torch
from torch import Tensor


def compute_dtype(features: Tensor) -> torch.dtype:
    """float32 for half precision and float32 features, float64 for float64."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x converted to `dtype`.  If x has that type, this saves the microsecond that `x.to` takes."""
    return x if x.dtype == dtype else x.to(dtype)


def as_types(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """`as_type` of each tensor; None stays None."""
    found = []
    for x in tensors:
        found.append(x if x is None or x.dtype == dtype else x.to(dtype))
    return found
