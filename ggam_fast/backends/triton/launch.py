"""Launching a kernel again without what Triton works out anew at every call.

`kernel[grid](...)` binds and specialises all arguments and asks the driver about every pointer: 12 us, and 4
us for each pointer, on the machine of `bench/results/h100.md`.  Here a kernel's compiled form is remembered
with what Triton specialised it for; launched as in Triton's tutorial on fused softmax, it takes addresses.
While a recording is made (`record`), a launch is noted instead.
"""

import threading
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

_MOST = 1 << 12
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], Any]] = {}


class _Thread(threading.local):
    recorder: Any = None
    """What notes this thread's launches instead of launching them."""


thread = _Thread()


def recorder() -> Any:
    """What notes this thread's launches; usually None."""
    return thread.recorder


def record_to(recorder: Any) -> None:
    """Note this thread's launches there; None launches them again."""
    thread.recorder = recorder


def launch(kernel: Any, programs: int, *arguments: Tensor | int | float | None, **constants: Any) -> None:
    """`kernel[(programs,)](*arguments, **constants)` on the device of the first argument, a tensor: tensors
    and numbers in the kernel's order, then its compile-time constants and launch options by name.

    Raises what Triton raises: for a tensor that is not on the GPU, for a kernel that does not compile.
    """
    if thread.recorder is not None:
        thread.recorder.launch(kernel, programs, arguments, constants)
        return
    first = arguments[0]
    assert isinstance(first, Tensor)
    with torch.cuda.device_of(first):
        if not remembers(kernel):
            kernel[(programs,)](*arguments, **constants)
            return
        # As a key a JITFunction would be hashed in Python, under its lock.
        key: list[Any] = [id(kernel), *options(), *constants, *constants.values()]
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
                if len(_compiled) >= _MOST:
                    _compiled.clear()
                # With the kernel, whose id must not become another's.
                _compiled[found] = compiled, trailing(kernel, len(arguments), constants), kernel
            return
        compiled, rest, _ = known
        compiled[(programs, 1, 1)](*values, *rest)


def remembers(kernel: Any) -> bool:
    """Whether a compiled form can be kept: not in Triton's interpreter; and on AMD Triton specialises for a
    tensor's size in memory too."""
    return isinstance(kernel, triton.JITFunction) and torch.version.hip is None


def options() -> tuple[Any, ...]:
    """Triton's own settings that a compiled form depends on."""
    knobs = triton.knobs
    return (
        knobs.runtime.debug,
        knobs.compilation.instrumentation_mode,
        knobs.runtime.add_stages_inspection_hook,
    )


def trailing(kernel: Any, count: int, constants: dict[str, Any]) -> tuple[Any, ...]:
    """The values of the kernel's parameters behind the first `count`, which are compile-time constants."""
    return tuple(constants[name] for name in kernel.arg_names[count:])


def _serves_all_alike(compiled: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether this is what to launch for all arguments of these kinds.  Not what is still being compiled, or
    what a hook of Triton's returns instead; nor with memory of the host, which has to be pinned each time."""
    on_gpu = all(x.is_cuda for x in arguments if isinstance(x, Tensor))
    return on_gpu and isinstance(compiled, triton.compiler.CompiledKernel)


@lru_cache(1 << 12)
def kind(x: int) -> tuple[bool, bool, bool]:
    """What of a number Triton compiles into a kernel."""
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31
