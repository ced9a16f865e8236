"""Which type the small tensors have, and autocast kept away from them."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(features: Tensor) -> torch.dtype:
    """float32 for half precision and float32 features, float64 for float64."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this type, without the microsecond that `x.to` takes to find that it has nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def full_precision(features: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off for the features' device."""
    # Only where it is on: torch.export (2.15) fails to save some autocast blocks.
    return torch.autocast(features.device.type, enabled=False) if autocasts(features) else nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
