"""Records every address that a kernel's programs load and store, in Triton's interpreter."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ggam_fast import checks

needs_interpreter = pytest.mark.skipif(
    not checks.TRITON_AVAILABLE or torch.cuda.is_available(), reason="watches Triton's interpreter"
)


class Access(NamedTuple):
    launch: int
    program: int
    addresses: np.ndarray


class Trace:
    """Accesses in order, and the buffers that the operators allocated (kept alive: no address is reused)."""

    def __init__(self) -> None:
        self.loads: list[Access] = []
        self.stores: list[Access] = []
        self.buffers: list[Tensor] = []
        self.launches = 0

    def unknown(self, tensors: Iterable[Tensor]) -> set[int]:
        """Accessed addresses that are no element of the given tensors or of a buffer."""
        known = np.concatenate([elements(t).ravel() for t in (*tensors, *self.buffers)])
        return set(_addresses([*self.loads, *self.stores])) - set(known)


def elements(tensor: Tensor) -> np.ndarray:
    """The address of every element, in the tensor's shape."""
    found = np.full(tensor.shape, tensor.data_ptr(), np.int64)
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        shape = [size if a == axis else 1 for a in range(tensor.dim())]
        found += np.arange(size, dtype=np.int64).reshape(shape) * stride * tensor.element_size()
    return found


def counts(accesses: list[Access], tensor: Tensor) -> np.ndarray:
    """How often each element of the tensor was accessed."""
    unique, times = np.unique(_addresses(accesses), return_counts=True)
    found = dict(zip(unique.tolist(), times.tolist(), strict=True))
    return np.array([found.get(a, 0) for a in elements(tensor).ravel().tolist()]).reshape(tensor.shape)


def _addresses(accesses: list[Access]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(a.addresses for a in accesses)])


@contextmanager
def traced(execute: bool = True) -> Iterator[Trace]:
    """Watch all kernels launched inside; without `execute` nothing is loaded (zeros are) or stored."""
    from triton.runtime import interpreter

    from ggam_fast.backends.triton import launch as launching

    trace, builder, empty = Trace(), interpreter.InterpreterBuilder, torch.empty
    load, store, launch = builder.create_masked_load, builder.create_masked_store, builder.set_grid_dim

    def record(self: Any, into: list[Access], pointers: Any, mask: Any) -> None:
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(np.int64)
        into.append(Access(trace.launches, self.grid_idx[0], addresses))

    def traced_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        record(self, trace.loads, pointers, mask)
        if not execute:
            mask = interpreter.TensorHandle(np.zeros_like(mask.data), mask.dtype)
        return load(self, pointers, mask, other, *rest)

    def traced_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record(self, trace.stores, pointers, mask)
        return store(self, pointers, value, mask, *rest) if execute else None

    def counted_launch(self: Any, *grid: int) -> None:
        trace.launches += 1
        launch(self, *grid)

    def kept(*args: Any, **kwargs: Any) -> Tensor:
        trace.buffers.append(empty(*args, **kwargs))
        return trace.buffers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", traced_load)
        patch.setattr(builder, "create_masked_store", traced_store)
        patch.setattr(builder, "set_grid_dim", counted_launch)
        patch.setattr(launching.torch, "empty", kept)
        yield trace
