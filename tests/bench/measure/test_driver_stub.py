"""Launches into the stub of the driver are counted and compute nothing."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from bench.measure import driver_stub  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or driver_stub.compiler() is None,
    reason="the stub of the driver needs a C compiler, and no GPU",
)


def copy(x, y, scale, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A kernel that is never compiled."""


def test_launches_into_the_stub_are_counted() -> None:
    kernel = triton.JITFunction(copy)
    x, y = torch.ones(8), torch.zeros(8)
    with driver_stub.active():
        before = driver_stub.launch_count()
        for _ in range(2):
            compiled = kernel[(3,)](x, y, 0.5, 8, BLOCK=8, num_warps=2)
        assert driver_stub.launch_count() - before == 2
        values = (x.data_ptr(), y.data_ptr(), 0.5, 8, 8)
        compiled[(3, 1, 1)](*values)
        compiled.run(3, 1, 1, 0, compiled.function, compiled.packed_metadata, None, None, None, *values)
        assert driver_stub.launch_count() - before == 4
        compiled[(0, 1, 1)](*values)  # Triton's launcher does not ask the driver to launch an empty grid
        assert driver_stub.launch_count() - before == 4
        with pytest.raises(TypeError):
            compiled[(3, 1, 1)]("x", *values[1:])
    assert isinstance(compiled, triton.compiler.CompiledKernel)
    assert compiled.packed_metadata == (2, 1, 0)
    assert not kernel.device_caches  # no kernel is left that could be launched without the stub
    assert not y.any()
