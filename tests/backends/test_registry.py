"""Backends by name."""

import pytest

import ggam_fast  # noqa: F401  (registers the backends)
from ggam_fast import checks
from ggam_fast.backends import registry
from ggam_fast.backends.differentiable import DifferentiableBackend
from ggam_fast.backends.torch import Backend


def test_backends_register_themselves() -> None:
    names = ["torch", "triton"] if checks.TRITON_AVAILABLE else ["torch"]
    for name in names:
        assert isinstance(registry.get_backend(name), Backend)
        differentiable = registry.get_differentiable(name)
        assert isinstance(differentiable, DifferentiableBackend)
        assert differentiable.name == name
    assert len({id(registry.get_backend(name)) for name in names}) == len(names)


def test_a_backend_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BACKENDS", {})
    backend = Backend()
    registry.register("own", backend)
    assert registry.get_backend("own") is backend
    with pytest.raises(KeyError):
        registry.get_backend("torch")
