"""Launching a kernel again without what Triton works out anew at every call.

`kernel[grid](...)` binds and specialises all arguments and asks the driver about every pointer: 12 us, and 4
us for each pointer, on the machine of `bench/results/h100.md`.  Here a kernel's compiled form is remembered
with what Triton specialised it for; launched as in Triton's tutorial on fused softmax, it takes addresses.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, programs: int, *arguments: Tensor | int | float | None, **constants: Any) -> None:
    """`kernel[(programs,)](*arguments, **constants)` on the device of the first argument, a tensor: tensors
    and numbers in the kernel's order, then its compile-time constants and launch options by name.

    Raises what Triton raises: for a tensor that is not on the GPU, for a kernel that does not compile.
    """
    first = arguments[0]
    assert isinstance(first, Tensor)
    with torch.cuda.device_of(first):
        # Triton's interpreter; on AMD Triton specialises for a tensor's size in memory too.
        if not isinstance(kernel, triton.JITFunction) or torch.version.hip is not None:
            kernel[(programs,)](*arguments, **constants)
            return
        # As a key a JITFunction would be hashed in Python, under its lock.
        key: list[Any] = [id(kernel), *constants, *constants.values()]
        values: list[Any] = []
        for x in arguments:
            if isinstance(x, Tensor):
                address = x.data_ptr()
                key += (x.dtype, x.get_device(), address % 16 == 0)
                values.append(address)
            else:
                key.append(kind(x) if isinstance(x, int) else type(x))
                values.append(x)
        known = _compiled.get(found := tuple(key))
        if known is None:
            compiled = kernel[(programs,)](*arguments, **constants)
            if _serves_all_alike(compiled, arguments):
                names = kernel.arg_names[len(arguments) :]
                _compiled[found] = compiled, tuple(constants[name] for name in names)
            return
        compiled, rest = known
        compiled[(programs, 1, 1)](*values, *rest)


def _serves_all_alike(compiled: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether this is what to launch for all arguments of these kinds.  Not what is still being compiled, or
    what a hook of Triton's returns instead; nor with memory of the host, which has to be pinned each time."""
    on_gpu = all(x.is_cuda for x in arguments if isinstance(x, Tensor))
    return on_gpu and isinstance(compiled, triton.compiler.CompiledKernel)


@lru_cache(1 << 12)
def kind(x: int) -> tuple[bool, bool, bool]:
    """What of a number Triton compiles into a kernel."""
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31
