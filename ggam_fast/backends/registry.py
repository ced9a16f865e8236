"""Backends by name, and a context that switches autocast off for them.

The torch backend is always there.  Another backend registers itself when it is imported.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .torch import TORCH, Backend

_BACKENDS: dict[str, tuple[Backend, Backend]] = {"torch": (TORCH, TORCH)}
_DIFFERENTIABLE: dict[str, Backend] = {}


def register(name: str, backend: Backend, traced: Backend | None = None) -> None:
    """Make `get_backend(name)` return `backend`, or `traced` (if given) for tracers and transforms."""
    _BACKENDS[name] = backend, backend if traced is None else traced


def register_differentiable(name: str, backend: Backend) -> None:
    """Make `get_differentiable(name)` return `backend`."""
    _DIFFERENTIABLE[name] = backend


def looked_into() -> bool:
    """Whether a compiler, a tracer, a transform or a dispatch mode must see operations."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")  # the vmap before torch.func
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    modes = torch._C._len_torch_dispatch_stack()
    # A mode that notes launches needs the backend that launches.
    return bool(modes and not getattr(torch._C._get_dispatch_stack_at(modes - 1), "notes_launches", False))


def get_backend(name: str) -> Backend:
    """The stages of "torch" or "triton", for code that autograd does not differentiate."""
    backend, traced = _BACKENDS[name]
    return traced if traced is not backend and looked_into() else backend


def get_differentiable(name: str) -> Backend:
    """The stages of "torch" or "triton" with derivatives of every order."""
    return _DIFFERENTIABLE[name]


def full_precision(features: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off for the features' device."""
    # Only if autocast is on: torch.export (2.15) fails to save some autocast blocks.
    return torch.autocast(features.device.type, enabled=False) if autocasts(features) else nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the tensor's device."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
