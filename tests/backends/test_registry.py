"""Backends by name, for eager code and for tracers and transforms."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import ggam_fast  # noqa: F401  (registers the backends)
from ggam_fast import checks
from ggam_fast.backends import registry
from ggam_fast.backends.registry import autocasts, full_precision
from ggam_fast.backends.torch import Backend
from ggam_fast.differentiable import DifferentiableBackend

needs_triton = pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="needs triton")
_, OPERATORS = registry._BACKENDS.get("triton", (None, None))


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


def _seen() -> Backend:
    return registry.get_backend("triton")


def _in_vmap() -> Backend:
    found: list[Backend] = []
    torch.vmap(lambda x: found.append(_seen()) or x)(torch.rand(2))
    return found[0]


def _in_batched_gradients() -> Backend:
    """Of vmap before torch.func, which `is_grads_batched` uses."""
    found: list[Backend] = []
    x = torch.rand(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: found.append(_seen()))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    return found[0]


def _in_a_dispatch_mode() -> Backend:
    with FlopCounterMode(display=False):
        return _seen()


def _in_a_fake_mode() -> Backend:
    with FakeTensorMode():
        return _seen()


def _in_forward_mode() -> Backend:
    with forward_ad.dual_level():
        return _seen()


def _compiled() -> Backend:
    found: list[Backend] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if registry.get_backend("triton") is OPERATORS else 0)

    found += [OPERATORS] * int(torch.compile(step, backend="eager", fullgraph=True)(torch.zeros(1)))
    return found[0]


@needs_triton
@pytest.mark.parametrize(
    "situation",
    [_in_vmap, _in_batched_gradients, _in_a_dispatch_mode, _in_a_fake_mode, _in_forward_mode, _compiled],
)
def test_operators_where_something_looks_into_operations(situation: Callable[[], Backend]) -> None:
    backend, traced = registry._BACKENDS["triton"]
    assert backend is not traced
    assert situation() is traced
    assert _seen() is backend


@needs_triton
def test_a_recorder_sees_the_stages_themselves() -> None:
    from ggam_fast.backends.triton.launch import Recorder

    with Recorder():
        assert _seen() is registry._BACKENDS["triton"][0]


def test_autocast_is_off_inside(device: torch.device) -> None:
    x = torch.rand(2, 2, device=device)
    assert not autocasts(x)
    with torch.autocast(device.type, torch.bfloat16):
        assert autocasts(x)
        assert not autocasts(x.to("meta"))
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x):
            assert (x @ x).dtype == torch.float32
