"""Backends by name.  They register themselves when they are imported; nothing here imports one."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .torch import Backend

_BACKENDS: dict[str, "Backend"] = {}
_DIFFERENTIABLE: dict[str, "Backend"] = {}


def register(name: str, backend: "Backend") -> None:
    """Make `get_backend(name)` return this."""
    _BACKENDS[name] = backend


def register_differentiable(name: str, backend: "Backend") -> None:
    """Make `get_differentiable(name)` return this."""
    _DIFFERENTIABLE[name] = backend


def get_backend(name: str) -> "Backend":
    """The stages of a resolved backend, "torch" or "triton", for code that autograd does not look into."""
    return _BACKENDS[name]


def get_differentiable(name: str) -> "Backend":
    """The same stages with a derivative of every order."""
    return _DIFFERENTIABLE[name]
