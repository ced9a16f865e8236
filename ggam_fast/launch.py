"""Launching a kernel again without what Triton works out anew at every call.

`kernel[grid](...)` binds and specialises all arguments and asks the driver about every pointer: 12 us, and 4
us for each pointer, on the machine of `bench/results/h100.md`.  Here a kernel's compiled form is remembered
with what Triton specialised it for; launched as in Triton's tutorial on fused softmax, it takes addresses.
"""

from typing import Any

import torch
import triton
from torch import Tensor

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, programs: int, *arguments: Tensor | int | float | None, **constants: Any) -> None:
    """`kernel[(programs,)](*arguments, **constants)`: tensors and numbers in the kernel's order, then its
    compile-time constants and launch options by name.

    Raises what Triton raises: for a tensor that is not on the GPU, for a kernel that does not compile.
    """
    # Triton's interpreter; on AMD Triton specialises for a tensor's size in memory too.
    if not isinstance(kernel, triton.JITFunction) or torch.version.hip is not None:
        kernel[(programs,)](*arguments, **constants)
        return
    kinds: list[object] = []
    values: list[object] = []
    for x in arguments:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            kinds.append((x.dtype, x.get_device(), address % 16 == 0))
            values.append(address)
        else:
            kinds.append(kind(x))
            values.append(x)
    # As a key a JITFunction would be hashed in Python, under its lock.
    key = (id(kernel), *kinds, *constants.items())
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[(programs,)](*arguments, **constants)
        names = kernel.arg_names[len(arguments) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)
        return
    compiled, rest = known
    compiled[(programs, 1, 1)](*values, *rest)


def kind(x: int | float | None) -> object:
    """What of a number Triton compiles into a kernel."""
    if x is None or isinstance(x, float):
        return type(x)
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31
