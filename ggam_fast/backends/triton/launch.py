"""Memory for a stage and launches of its kernels; or notes of both.

`kernel[grid](...)` binds and specialises all arguments and asks the driver about every pointer: 12 us, and 4
us for each pointer, on the machine of `dev/h100.md`.  Here a kernel's compiled form is remembered
with what Triton specialised it for; launched as in Triton's tutorial on fused softmax, it takes addresses.

`Recorder` runs the closed form on tensors that have a shape but no memory.  It notes every launch, and
refuses every other operation on a tensor but allocating one and viewing one: what it accepts is a list of
launches and nothing else (`record` makes tapes of it).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ggam_fast._checkout import load_sibling_kernels

load_sibling_kernels()

from ggam_fast.kernels import plan  # noqa: E402  (needs the line above in a bare checkout)

NORM = {"softmax": 0, "sum": 1, "sigmoid": 2, "none": 3}
POOL = {"avg": 0, "max": 1, "flatten": 2, "": 2}
CAM_NORM = {"sigmoid": 0, "softmax": 1, "standardized": 2}
# Multiply-adds round once, whatever Triton's default is: 3.9 warns that it will change.
FP_FUSION = {"enable_fp_fusion": True}


class _Thread(threading.local):
    recorder: "Recorder | None" = None
    """What notes this thread's launches instead of launching them."""
    faked = False
    """Whether a stage is asked for its outputs alone, by an operator's fake."""


thread = _Thread()


@contextmanager
def faked() -> Iterator[None]:
    """Stages make their outputs and launch nothing."""
    before, thread.faked = thread.faked, True
    try:
        yield
    finally:
        thread.faked = before


def runs(size: Any) -> bool:
    """Whether there is something to launch for; a fake does not look at the size, which may be a symbol."""
    return not thread.faked and size > 0


# ---- memory: what a launch does not need is None.  Triton compiles it away, and asks the driver about every
# pointer it is given (4 us each on the machine of `dev/h100.md`).


def native(features: Tensor) -> Tensor:
    """Features with one dense inner dimension; strides are read here, as Inductor may change them."""
    return features if 1 in (features.stride(1), features.stride(2)) else features.contiguous()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """All that the operators allocate comes from here."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def small(batch: int, size: int, like: Tensor) -> Tensor:
    """An empty float32 (batch, size)."""
    return empty((batch, size), like)


def per_image(batch: int, like: Tensor) -> Tensor:
    """An empty float32 (batch,)."""
    return empty((batch,), like)


def contiguous(x: Tensor | None) -> Tensor | None:
    """The same in dense memory; None stays."""
    return None if x is None else x.contiguous()


def pair(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """One or two tensors in dense memory, padded with None."""
    first, second = (*tensors, None, None)[:2]
    return contiguous(first), contiguous(second)


def partial_sums(features: Tensor, rows: int) -> Tensor:
    """Room for what `channel_sum` leaves to add up for R rows of weights: (N, R, P, L)."""
    return empty(
        plan.partial_sums(features.shape, features.stride(), features.element_size(), rows), features
    )


def like_layout(features: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty (N, C, L) tensor, dense, in the memory order of `features`."""
    batch, channels, positions = features.shape
    if features.stride(2) == 1 or features.stride(1) != 1:
        return empty((batch, channels, positions), features, dtype)
    return empty((batch, positions, channels), features, dtype).transpose(1, 2)


# ---- launches

_MOST = 1 << 12
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], Any]] = {}


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
                if not address and x.numel():
                    raise RuntimeError(f"a kernel takes tensors with memory of their own; got {type(x)}")
                key += (x.dtype, x.get_device(), address % 16 == 0)
                values.append(address)
            else:
                key.append(kind(x) if isinstance(x, int) else type(x))
                values.append(x)
        known = _compiled.get(found := tuple(key))
        if known is None:
            compiled = kernel[(programs,)](*arguments, **constants)
            if serve_all_alike([compiled], arguments):
                if len(_compiled) >= _MOST:
                    _compiled.clear()
                # With the kernel, whose id must not become another's.
                _compiled[found] = compiled, trailing(kernel, len(arguments), constants), kernel
            return
        compiled, rest, _ = known
        compiled[(programs, 1, 1)](*values, *rest)


class Work(NamedTuple):
    """A launch to come."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def launch_all(*works: Work) -> None:
    """Launch one after another."""
    for kernel, programs, arguments, constants in works:
        launch(kernel, programs, *arguments, **constants)


def clearing() -> tuple[Tensor | None, Any]:
    """For a launch that can clear counters: which, and how many."""
    return (None, 0) if thread.recorder is None else thread.recorder.clearing()


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


def serve_all_alike(compiled: Sequence[Any], arguments: Sequence[Any]) -> bool:
    """Whether these forms serve all arguments of these kinds.  Not what is still being compiled, or what a
    hook of Triton's returns instead; nor with memory of the host, which has to be pinned each time."""
    on_gpu = all(x.is_cuda for x in arguments if isinstance(x, Tensor))
    return on_gpu and all(isinstance(form, triton.compiler.CompiledKernel) for form in compiled)


@lru_cache(1 << 12)
def kind(x: int) -> tuple[bool, bool, bool]:
    """What of a number Triton compiles into a kernel."""
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31


# ---- notes

_FILLS = {"zeros": 0.0, "new_zeros": 0.0, "zeros_like": 0.0, "ones": 1.0, "new_ones": 1.0, "ones_like": 1.0}
_EMPTY = ("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like")


class NotRecordable(Exception):
    """The step does more than launch kernels."""


class Number(float):
    """A number that each replay is given anew; it goes into launches as it is."""

    def _refuse(self, *_: Any) -> Any:
        raise NotRecordable("arithmetic with a number that each replay is given")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __neg__ = _refuse
    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


class Memory:
    """What one storage of the recording is."""

    def __init__(self, tensor: Tensor, fill: float | None = None):
        self.tensor, self.fill = tensor, fill  # the tensor keeps its storage, and so its key, alive
        self.bytes = tensor.untyped_storage().nbytes()


class Note(NamedTuple):
    """One launch, as it was asked for."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    rest: tuple[Any, ...] | None  # what a compiled form takes behind the arguments; None: none can be kept


class Recorder(TorchDispatchMode):
    """Notes the launches of the closed form; see above."""

    notes_launches = True

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, Memory] = {}
        self.notes: list[Note] = []
        self.passes = 0  # that were taken
        self.parts: dict[int, tuple[int, int]] = {}  # storages that lie in another, and where
        with _disable_current_modes():
            self.counters = torch.empty(1, dtype=torch.int32, device="meta")  # all of a pass, as one
        self.count = Number(0)
        self._before: Any = None

    def __enter__(self) -> "Recorder":
        self._before, thread.recorder = thread.recorder, self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        thread.recorder = self._before
        super().__exit__(*error)

    def like(self, x: Tensor) -> Tensor:
        """A tensor that stands for one of x's shape, strides and type."""
        with _disable_current_modes():
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    def like_each(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One for each; the same for the same."""
        twins = {id(x): x for x in tensors}
        made = {key: self.like(x) for key, x in twins.items()}
        return [made[id(x)] for x in tensors]

    def scalar(self) -> Tensor:
        """A tensor that stands for a float32 scalar."""
        with _disable_current_modes():
            return torch.empty((), device="meta")

    def launch(
        self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        rest = trailing(kernel, len(arguments), constants) if remembers(kernel) else None
        self.notes.append(Note(kernel, programs, arguments, constants, rest))

    def take(self) -> list[Note]:
        """The launches noted since the last call."""
        notes, self.notes = self.notes, []
        self.passes += 1
        return notes

    def together(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of all these (each dense and float32) in their order, each at whole blocks of 16
        bytes."""
        at = 0
        with _disable_current_modes():
            sizes = [(x.numel() + 3) // 4 * 4 for x in tensors]
            whole = torch.empty(sum(sizes), device="meta")
            for x, size in zip(tensors, sizes, strict=True):
                begin = _key(whole), 4 * (at - int(x.storage_offset()))
                if not x.is_contiguous() or self.parts.setdefault(_key(x), begin) != begin:
                    raise NotRecordable("a part that is not whole, or not behind its neighbour")
                if self.memory[_key(x)].fill is not None:
                    raise NotRecordable("a part that no launch writes")
                at += size
        self.memory[_key(whole)] = Memory(whole)
        return whole

    def clearing(self) -> tuple[Tensor | None, Any]:
        """For a launch that can clear counters: those of all that follow, if it is the first one."""
        return (None, 0) if self.notes or self.passes else (self.counters, self.count)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        if name in _EMPTY or name in _FILLS:
            out = func(*args, **(kwargs | {"device": "meta"}))
            self.memory[_key(out)] = Memory(out, _FILLS.get(name))
            return out
        views = [r.alias_info for r in func._schema.returns]
        if views and all(v is not None and not v.is_write for v in views):
            return func(*args, **kwargs)
        raise NotRecordable(f"{func} between launches")


def _key(x: Tensor) -> int:
    """Which storage it is in, as long as the storage lives."""
    return x.untyped_storage()._cdata
