"""Allocates the memory of a stage and launches its kernels, or notes both for a recording.

`kernel[grid](...)` binds and specialises all arguments and asks the driver about every pointer: 12 us, and 4
us for each pointer, on the machine of `dev/h100.md`.  This file keeps a kernel's compiled form by what Triton
specialised it for.  Launched as in Triton's tutorial on fused softmax, that form takes addresses.

`Recorder` runs the closed form on tensors that have a shape but no memory, and notes every launch.  It allows
only launches, allocations and views.  `record` makes tapes of the launches.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ggam_fast._checkout import load_sibling_kernels

load_sibling_kernels()

from ggam_fast.kernels import plan as plan  # noqa: E402  (needs the line above in a bare checkout)

NORM = {"softmax": 0, "sum": 1, "sigmoid": 2, "none": 3}
POOL = {"avg": 0, "max": 1, "flatten": 2, "": 2}
# Odd: a softmax.  At least 2: of z-scores.
CAM_NORM = {"sigmoid": 0, "softmax": 1, "standardized": 2, "standardized_softmax": 3}
DIVERGENCE = {"symmetric": 0, "forward": 1, "reverse": 2}
POSITION_GUIDANCE = {"relu": 0, "standardized_softmax": 1}
# Multiply-adds round once.  Triton 3.9 warns that its default will change.
FP_FUSION = {"enable_fp_fusion": True}


class _Thread(threading.local):
    recorder: "Recorder | None" = None
    """The recorder that notes this thread's launches instead of launching them."""
    faked = False
    """Whether a stage only allocates its outputs, for an operator's fake."""


thread = _Thread()


@contextmanager
def faked() -> Iterator[None]:
    """A context in which stages allocate their outputs and launch nothing."""
    before, thread.faked = thread.faked, True
    try:
        yield
    finally:
        thread.faked = before


def runs(size: Any) -> bool:
    """Whether to launch for this size.  A fake does not read the size, which may be a symbol."""
    return not thread.faked and size > 0


# ---- memory: a pointer that a launch does not need is None.  Triton compiles None away, and it asks the
# driver about every other pointer (4 us each on the machine of `dev/h100.md`).


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor.  The operators allocate all tensors here."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def small(batch: int, size: int, like: Tensor) -> Tensor:
    """An empty float32 (batch, size)."""
    return empty((batch, size), like)


def per_image(batch: int, like: Tensor) -> Tensor:
    """An empty float32 (batch,)."""
    return empty((batch,), like)


def contiguous(x: Tensor | None) -> Tensor | None:
    """x in dense memory; None stays None."""
    return None if x is None else x.contiguous()


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
    """Launch `kernel[(programs,)](*arguments, **constants)` on the device of the first argument, a tensor.

    `arguments` are tensors and numbers in the kernel's order.  `constants` are its compile-time constants and
    launch options.  Triton raises an error for a tensor that is not on the GPU and for a kernel that does not
    compile.
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
        # The key has the kernel's id, because a JITFunction hashes itself in Python, under its lock.
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
                # Keep the kernel alive, so that no other kernel gets its id.
                _compiled[found] = compiled, trailing(kernel, len(arguments), constants), kernel
            return
        compiled, rest, _ = known
        compiled[(programs, 1, 1)](*values, *rest)


class Empty(NamedTuple):
    """Memory that `launch_all` allocates before its launches."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


class Row(NamedTuple):
    """One row of such memory."""

    of: Empty
    at: int


class Work(NamedTuple):
    """A launch that has not been made yet.  Arguments may be `Empty`, `Row`, `Zeros` or `CLEARING`."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Zeros(NamedTuple):
    """Zeroed int32 counters for one launch."""

    size: int


CLEARING = object()
"""In place of two arguments, counters and how many of them, which the first launch of a recording clears."""


def launch_all(like: Tensor, outputs: Sequence[Any], works: Sequence[Work]) -> list[Tensor]:
    """Allocate all memory on the device of `like`, launch the works in order, and return the outputs."""
    made: dict[int, Tensor] = {}

    def memory(x: Any) -> Any:
        if type(x) is Row:
            return memory(x.of)[x.at]
        if type(x) is not Empty:
            return x
        if id(x) not in made:
            made[id(x)] = empty(x.shape, like, x.dtype)
        return made[id(x)]

    found = [memory(x) for x in outputs]
    for kernel, programs, arguments, constants in works:
        given: list[Any] = []
        for x in arguments:
            if x is CLEARING:
                given += (None, 0) if thread.recorder is None else thread.recorder.clearing()
            elif type(x) is Zeros:
                given.append(torch.zeros((x.size,), dtype=torch.int32, device=like.device))
            else:
                given.append(memory(x))
        launch(kernel, programs, *given, **constants)
    return found


def remembers(kernel: Any) -> bool:
    """Whether a compiled form can be kept.

    Triton's interpreter has none, and for AMD Triton also specialises for a tensor's size in memory.
    """
    return isinstance(kernel, triton.JITFunction) and torch.version.hip is None


options = partial(
    attrgetter("runtime.debug", "compilation.instrumentation_mode", "runtime.add_stages_inspection_hook"),
    triton.knobs,
)
"""Triton's own settings that a compiled form depends on.  Not a function: every replay reads them."""


def trailing(kernel: Any, count: int, constants: dict[str, Any]) -> tuple[Any, ...]:
    """The values of the kernel's parameters after the first `count`; these are compile-time constants."""
    return tuple(constants[name] for name in kernel.arg_names[count:])


def serve_all_alike(compiled: Sequence[Any], arguments: Sequence[Any]) -> bool:
    """Whether these compiled forms can take addresses, for all arguments of these kinds.

    A form that is still being compiled cannot, nor can a replacement from a Triton hook.  Host memory is also
    excluded, because it has to be pinned each time.
    """
    on_gpu = all(x.is_cuda for x in arguments if isinstance(x, Tensor))
    return on_gpu and all(isinstance(form, triton.compiler.CompiledKernel) for form in compiled)


@lru_cache(1 << 12)
def kind(x: int) -> tuple[bool, bool, bool]:
    """The properties of a number for which Triton specialises a kernel."""
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31


# ---- notes

_FILLS = {"zeros": 0.0, "new_zeros": 0.0, "zeros_like": 0.0, "ones": 1.0, "new_ones": 1.0, "ones_like": 1.0}
_EMPTY = ("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like")


class NotRecordable(Exception):
    """Raised if a step does more than launch kernels."""


class Number(float):
    """A number that changes from replay to replay.  It may be passed to launches, but not computed with."""

    def _refuse(self, *_: Any) -> Any:
        raise NotRecordable("arithmetic with a number that changes from replay to replay")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __neg__ = _refuse
    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse


class Memory:
    """One storage of a recording."""

    def __init__(self, tensor: Tensor, fill: float | None = None):
        self.tensor, self.fill = tensor, fill  # the tensor keeps its storage, and so its key, alive
        self.bytes = tensor.untyped_storage().nbytes()


class Note(NamedTuple):
    """One noted launch."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    rest: tuple[Any, ...] | None  # a compiled form's values after the arguments; None: none can be kept


class Recorder(TorchDispatchMode):
    """Notes the launches of the closed form (see the top of this file)."""

    notes_launches = True

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[int, Memory] = {}
        self.notes: list[Note] = []
        self.passes = 0  # number of calls of `take`
        self.parts: dict[int, tuple[int, int]] = {}  # storages inside another one: (that one, offset)
        with _disable_current_modes():
            self.counters = torch.empty(1, dtype=torch.int32, device="meta")  # all counters of a pass
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
        """`like` of each tensor; a tensor that occurs twice has one stand-in."""
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
        """One tensor that holds all of these (dense, float32) in order, each at a multiple of 16 bytes."""
        at = 0
        with _disable_current_modes():
            sizes = [(x.numel() + 3) // 4 * 4 for x in tensors]
            whole = torch.empty(sum(sizes), device="meta")
            for x, size in zip(tensors, sizes, strict=True):
                begin = _key(whole), 4 * (at - int(x.storage_offset()))
                if not x.is_contiguous() or self.parts.setdefault(_key(x), begin) != begin:
                    raise NotRecordable("a part that is not contiguous, or does not follow the one before it")
                if self.memory[_key(x)].fill is not None:
                    raise NotRecordable("a part that no launch writes")
                at += size
        self.memory[_key(whole)] = Memory(whole)
        return whole

    def clearing(self) -> tuple[Tensor | None, Any]:
        """(counters, how many) that a launch has to clear: the first one clears all counters of the pass."""
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
    """A key of the tensor's storage, valid while the storage lives."""
    return x.untyped_storage()._cdata
