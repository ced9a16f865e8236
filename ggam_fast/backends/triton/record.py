"""A step's launches, recorded once from the closed form and replayed without it.

`launch.Recorder` notes the launches of the closed form.  `Recording` turns the notes into a `Tape`, whose
launches name their tensors by slot and offset:

    environment = [kept, scratch, constants, counters, *inputs, *outputs]        addresses and numbers

`kept` holds the forward's results that the backward reads.  `scratch` holds every other tensor that is
neither input nor output.  Each replay allocates both, so replays may be nested and interleaved.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from . import launch as launching
from .launch import Memory, Note, NotRecordable, Number, Recorder

KEPT, SCRATCH, CONSTANTS, COUNTERS, FIRST = range(5)
_ALIGNMENT = 256  # bytes, for every tensor in an arena


class Launch:
    """A launch that looks up its changing values in an environment."""

    def __init__(self, note: Note, place: Callable[[Any], tuple[int, int]]):
        self.kernel, self.programs, self.constants = note.kernel, note.programs, note.constants
        self.values: list[Any] = list(note.arguments)
        self.dynamic: list[tuple[int, int, int]] = []  # (argument, slot, bytes from the slot's address)
        self.types: dict[int, torch.dtype] = {}
        for i, x in enumerate(note.arguments):
            if isinstance(x, (Tensor, Number)):
                self.dynamic.append((i, *place(x)))
                self.values[i] = None
                if isinstance(x, Tensor):
                    self.types[i] = x.dtype
        self.rest = note.rest
        self.run: Any = None
        self.count = len(note.arguments)

    def first(self, environment: Sequence[Any], tensors: Sequence[Any]) -> Any:
        """Launch through Triton, which takes tensors and compiles.  Returns the compiled form."""
        arguments = self.values[: self.count]
        for i, slot, offset in self.dynamic:
            dtype = self.types.get(i)
            arguments[i] = environment[slot] if dtype is None else _at(tensors[slot], offset, dtype)
        return self.kernel[(self.programs,)](*arguments, **self.constants)

    def keep(self, compiled: Any) -> None:
        """Keep the compiled form, so that `run` takes addresses."""
        assert self.rest is not None
        # Assign a new list: another thread may do the same at the same time.
        self.values = [*self.values[: self.count], *self.rest]
        self.function, self.packed = compiled.function, compiled.packed_metadata
        self.run = compiled.run

    def written(self, index: int, names: dict[str, Any]) -> str:
        """The launch as a line of Python that uses the environment as `e0`, `e1`, ...

        The objects that the line calls are added to `names`.
        """
        inner = _Inner(self.run, self.function, self.packed, self.values)
        names |= {f"call{index}": inner.call, f"middle{index}": inner.middle}
        values = [repr(x) for x in self.values]
        for i, slot, offset in self.dynamic:
            values[i] = f"e{slot} + {offset}" if offset else f"e{slot}"
        arguments = "".join(f"{x}, " for x in values)
        if inner.packs:
            arguments = f"({arguments})"
        return f"    call{index}({self.programs}, 1, 1, stream, *middle{index}, {arguments})"


class _Inner:
    """The call inside Triton's launcher, which takes half the time of the launcher.

    If the launcher has memory to allocate, or its call has another form, this is the launcher itself.
    """

    def __init__(self, run: Any, function: Any, packed: Any, values: list[Any]):
        self.call, self.packs = run, False
        self.middle: tuple[Any, ...] = (function, packed, None, None, None)
        if getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1):
            return
        found: list[tuple[Any, ...]] = []
        twin = copy.copy(run)
        twin.launch = lambda *arguments: found.append(arguments)
        begin = (7, 1, 1, 11)  # programs and stream
        twin(*begin, *self.middle, *values)
        if len(found) != 1 or found[0][:4] != begin:
            return
        (inner,) = found
        if inner[-1] == tuple(values):
            self.call, self.packs, self.middle = run.launch, True, inner[4:-1]
        elif inner[-len(values) :] == tuple(values):
            self.call, self.middle = run.launch, inner[4 : -len(values)]


def _arena(
    size: int, dtype: torch.dtype, device: torch.device, make: Callable[..., Tensor] = torch.empty
) -> Callable[[], Tensor] | None:
    return partial(make, size, dtype=dtype, device=device) if size else None


def _at(tensor: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """One element of type `dtype`, `offset` bytes after the tensor's first byte."""
    start = tensor.storage_offset() * tensor.element_size() + offset
    out = torch.empty(0, dtype=dtype, device=tensor.device)
    return out.set_(tensor.untyped_storage(), start // out.element_size(), (1,), (1,))


class Tape:
    """Launches in order, and the size of each arena of a replay."""

    def __init__(self, launches: list[Launch], scratch: int, counters: int, device: torch.device):
        self.launches, self.device = launches, device
        self._scratch = _arena(scratch, torch.uint8, device)
        self._counters = _arena(counters, torch.int32, device, torch.zeros)
        self.compiled = not launches
        """Whether a replay uses addresses.  The first replay goes through Triton instead."""
        self._launch_all: Callable[[int, tuple[Any, ...]], None] | None = None

    def play(
        self,
        kept: Tensor | None,
        constants: Tensor | None,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        addresses: Sequence[int],
        numbers: Sequence[float],
    ) -> None:
        """Launch everything on the current stream of the device.

        `addresses` are those of the inputs and then the outputs.
        """
        scratch = None if self._scratch is None else self._scratch()
        counters = None if self._counters is None else self._counters()
        environment = (
            0 if kept is None else kept.data_ptr(),
            0 if scratch is None else scratch.data_ptr(),
            0 if constants is None else constants.data_ptr(),
            0 if counters is None else counters.data_ptr(),
            *addresses,
            *map(float, numbers),  # Triton specialises for the value of an int
        )
        if not self.compiled or _hooked():
            arenas = (kept, scratch, constants, counters)
            tensors = [*arenas, *inputs, *outputs]
            with torch.cuda.device_of(inputs[0]):
                compiled = [launch.first(environment, tensors) for launch in self.launches]
            keeps = all(launch.rest is not None for launch in self.launches)
            if not self.compiled and keeps and launching.serve_all_alike(compiled, tensors):
                for launch, form in zip(self.launches, compiled, strict=True):
                    launch.keep(form)
                self.compiled = True
            return
        index = self.device.index
        if index is None or torch.cuda.current_device() == index:
            self._launch(environment, index)
        else:
            with torch.cuda.device(index):
                self._launch(environment, index)

    def _launch(self, environment: tuple[Any, ...], index: int | None) -> None:
        stream = driver.active.get_current_stream(index)
        if self._launch_all is None:
            self._launch_all = self._written(len(environment))
        self._launch_all(stream, environment)

    def _written(self, size: int) -> Callable[[int, tuple[Any, ...]], None]:
        """All launches as one function without a loop.  A replay spends most of its time in it."""
        names: dict[str, Any] = {}
        lines = [launch.written(i, names) for i, launch in enumerate(self.launches)]
        unpacked = "".join(f"e{i}, " for i in range(size))
        exec(
            "\n".join(["def launch_all(stream, environment):", f"    {unpacked}= environment", *lines]), names
        )
        return names["launch_all"]


_runtime = triton.knobs.runtime


def _hooked() -> bool:
    """Whether a profiler has to see every launch and its arguments."""
    return bool(_runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls)


class Pass(NamedTuple):
    """The notes of a forward or a backward: launches, inputs, numbers and outputs."""

    notes: Sequence[Note]
    inputs: Sequence[Tensor]
    numbers: Sequence[Number]
    outputs: Sequence[Tensor | None]


class Recording:
    """The tapes of a forward and of its backward, if there is one.

    `saved` lists the forward's tensors that the backward also needs, as indices into the forward's inputs
    followed by its outputs.
    """

    def __init__(self, recorder: Recorder, passes: Sequence[Pass], device: torch.device):
        self.device = device
        forward = passes[0]
        shared = [*forward.inputs, *_some(forward.outputs)]
        touched = [_touched(p) for p in passes]
        own = [{_key(x) for x in (*p.inputs, *_some(p.outputs))} for p in passes]
        later = touched[1] - own[1] if len(passes) > 1 else set()
        self.saved = [i for i, x in enumerate(shared) if _key(x) in later]
        self.strides = [shared[i].stride() for i in self.saved]
        lists = [shared]
        if len(passes) > 1:
            made = {_key(x): x for x in _some(passes[1].outputs)}  # one slot a storage
            lists.append([*passes[1].inputs, *(shared[i] for i in self.saved), *made.values()])
        slots = [{_key(x): FIRST + i for i, x in enumerate(given)} for given in lists]

        self._filled: list[tuple[int, Memory]] = []
        sizes = {KEPT: 0, CONSTANTS: 0}
        placed: dict[int, tuple[int, int]] = {}
        tapes = []
        for at, p in enumerate(passes):
            scratch = counters = 0
            here = dict(placed)
            cleared = any(x is recorder.counters for note in p.notes[:1] for x in note.arguments)
            here |= {
                k: (slots[at][whole], o) for k, (whole, o) in recorder.parts.items() if whole in slots[at]
            }
            for key in _in_order(p):
                if key in slots[at] or key in here or key == _key(recorder.counters):
                    continue
                memory = recorder.memory.get(key)
                if memory is None:
                    raise NotRecordable("a tensor that was neither given nor allocated")
                if memory.fill is None and key in later and at == 0:
                    placed[key] = here[key] = KEPT, sizes[KEPT]
                    sizes[KEPT] += _rounded(memory.bytes)
                elif memory.fill is None:
                    here[key] = SCRATCH, scratch
                    scratch += _rounded(memory.bytes)
                elif memory.tensor.dtype == torch.int32:
                    here[key] = COUNTERS, 4 * counters
                    counters += memory.bytes // 4
                else:
                    placed[key] = here[key] = CONSTANTS, sizes[CONSTANTS]
                    self._filled.append((sizes[CONSTANTS], memory))
                    sizes[CONSTANTS] += _rounded(memory.bytes)
            if cleared:  # the first launch clears them, so they need no memory of their own
                begin = SCRATCH, scratch
                here |= {k: (SCRATCH, scratch + o) for k, (s, o) in here.items() if s == COUNTERS}
                here[_key(recorder.counters)] = begin
                scratch += _rounded(4 * counters)
            numbers = {id(n): FIRST + len(lists[at]) + i for i, n in enumerate(p.numbers)}
            place = _placer(slots[at], here, numbers)
            launches = [Launch(_counted(note, recorder, counters), place) for note in p.notes]
            tapes.append(Tape(launches, scratch, 0 if cleared else counters, device))
        self.forward, self.backward = tapes[0], tapes[1] if len(tapes) > 1 else None
        self.constant: Sequence[int] = ()  # outputs without a gradient
        self.checked = False  # whether the labels of the call that is recorded have been checked
        self.again: Any = None  # the backward by autograd, for cases that cannot be replayed
        self._constant_bytes = sizes[CONSTANTS]
        self.kept = _arena(sizes[KEPT], torch.uint8, device)
        """Allocates the memory that is kept from a forward to its backward; None if there is none."""
        self.outputs = [_Blank(x, recorder.memory.get(_key(x)), device) for x in _some(forward.outputs)]
        wholes = {whole for whole, _ in recorder.parts.values()}
        for blank, x in zip(self.outputs, _some(forward.outputs), strict=True):
            if blank.fill is None and _key(x) not in touched[0] and _key(x) not in wholes:
                raise NotRecordable("an output that no launch writes")
        self._constants: Tensor | None = None
        # The backward's first output is dA, and the others are the parameters' gradients.
        da, *grads = passes[1].outputs if len(passes) > 1 else [None]
        self.da = None if da is None else _Blank(da, None, device)
        self.gradients = _Gradients(_some(grads), device)

    def constants(self) -> Tensor | None:
        """Memory that launches only read.  It is filled once."""
        if self._constants is None and self._constant_bytes:
            on_gpu = self.device.type == "cuda"
            capturing = on_gpu and torch.cuda.is_current_stream_capturing()
            constants = torch.empty(self._constant_bytes, dtype=torch.uint8, device=self.device)
            for offset, memory in self._filled:
                part = constants[offset : offset + memory.bytes].view(memory.tensor.dtype)
                assert memory.fill is not None
                part.fill_(memory.fill)
            if capturing:  # memory allocated during a capture belongs to that graph
                return constants
            if on_gpu:
                torch.cuda.current_stream(self.device).synchronize()  # once; other streams will read it
            self._constants = constants
        return self._constants


class _Blank:
    """Allocates an output, which a replay then fills."""

    def __init__(self, x: Tensor, memory: Memory | None, device: torch.device):
        self.shape = x.shape
        self.fill = None if memory is None else memory.fill
        self.make: Callable[[], Tensor]
        if self.fill is not None:
            self.make = partial(torch.full, x.shape, self.fill, dtype=x.dtype, device=device)
        elif x.is_contiguous():
            self.make = partial(torch.empty, x.shape, dtype=x.dtype, device=device)
        else:
            self.make = partial(torch.empty_strided, x.shape, x.stride(), dtype=x.dtype, device=device)


class _Gradients:
    """Gradients as views of one tensor.  Gradients that share a storage stay side by side."""

    def __init__(self, outputs: list[Tensor], device: torch.device):
        groups: dict[int, list[int]] = {}
        for i, x in enumerate(outputs):
            groups.setdefault(_key(x), []).append(i)
        self._templates: list[Tensor] = []
        self._begins: list[int] = []
        where: dict[int, int] = {}
        for group in groups.values():
            self._begins.append(len(self._templates))
            end = 0
            for i in sorted(group, key=lambda i: outputs[i].storage_offset()):
                if outputs[i].storage_offset() != end or not outputs[i].is_contiguous():
                    raise NotRecordable("a gradient with gaps before it")
                end += outputs[i].numel()
                where[i] = len(self._templates)
                self._templates.append(torch.empty(()).expand(outputs[i].shape))
            self._templates.append(torch.empty(-end % 4))  # so that each begins at 16 bytes
        self._where = [where[i] for i in range(len(outputs))]
        self._flat = partial(torch.empty, sum(x.numel() for x in self._templates), device=device)

    def make(self) -> tuple[list[Tensor], list[Tensor]]:
        """A view at the beginning of each storage, and the gradients."""
        if not self._where:
            return [], []
        parts = torch._C._nn.unflatten_dense_tensors(self._flat(), self._templates)
        return [parts[i] for i in self._begins], [parts[i] for i in self._where]


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _some(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _in_order(p: Pass) -> list[int]:
    return list(dict.fromkeys(_key(x) for note in p.notes for x in note.arguments if isinstance(x, Tensor)))


def _touched(p: Pass) -> set[int]:
    return set(_in_order(p))


def _counted(note: Note, recorder: Recorder, counters: int) -> Note:
    """The note, with the number of counters that its launch has to clear."""
    arguments = [counters if x is recorder.count else x for x in note.arguments]
    if not counters:
        arguments = [None if x is recorder.counters else x for x in arguments]
    return note._replace(arguments=tuple(arguments))


def _placer(
    slots: dict[int, int], here: dict[int, tuple[int, int]], numbers: dict[int, int]
) -> Callable[[Tensor | Number], tuple[int, int]]:
    def place(x: Tensor | Number) -> tuple[int, int]:
        if isinstance(x, Number):
            return numbers[id(x)], 0
        key = _key(x)
        slot, offset = (slots[key], 0) if key in slots else here[key]
        return slot, offset + int(x.storage_offset()) * x.element_size()

    return place
