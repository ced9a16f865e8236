"""What a recorder notes and refuses, where the memory of a replay is, and the arguments of its launches."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import driver_stub
from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.backends.triton.launch import launch, thread
from ggam_fast.backends.triton.record import NotRecordable, Number, Pass, Recorder, Recording

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
ROWS, FOUR = torch.rand(4, 6), torch.rand(4)


class Kernel:
    """Keeps what it is launched with: addresses of tensors, and numbers."""

    def __init__(self) -> None:
        self.launches: list[list[Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> None:
            self.launches.append([x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])

        return run


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def recording(
    x: Tensor, body: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Recording:
    """Of one input, one output, and a gradient of one more."""
    note = Recorder()
    with torch.no_grad(), note:
        (given,) = note.like_each([x])
        out = body(given)
        passes = [Pass(note.take(), [given], [], [out])]
        if backward is not None:
            grad = note.like(out)
            da = backward(grad, given)
            passes.append(Pass(note.take(), [grad], [], [da]))
    return Recording(note, passes, CPU)


def play(found: Recording, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The output and the memory that is kept."""
    out, kept = found.outputs[0].make(), None if found.kept is None else found.kept()
    found.forward.play(kept, found.constants(), [x], [out], [x.data_ptr(), out.data_ptr()], ())
    return out, kept


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + 1,
        lambda x: x.clone(),
        lambda x: x.sum(),
        lambda x: x.copy_(x),
        lambda x: x.t().contiguous(),
        lambda x: torch.full((3,), 2.0),
        lambda x: float(x[0, 0]),
    ],
    ids=["add", "clone", "sum", "copy_", "contiguous", "full", "item"],
)
def test_operations_between_launches_are_refused(operation: Callable[[Tensor], object]) -> None:
    with Recorder() as note:
        x = note.like(ROWS)
        with pytest.raises((NotRecordable, RuntimeError)) as error:
            operation(x)
    assert isinstance(error.value, NotRecordable)
    assert thread.recorder is None


def test_views_and_allocations_are_not_refused(kernel: Kernel) -> None:
    with Recorder() as note:
        assert thread.recorder is note
        x = note.like(ROWS)
        y = torch.empty_like(x).view(-1)[3:].unsqueeze(0).expand(2, 21).t().detach()
        launch(kernel, 2, x.contiguous(), y, torch.zeros(4), None, 7)
        assert len(note.take()) == 1
        assert not note.take()
    assert not kernel.launches


@pytest.mark.parametrize(
    "arithmetic",
    [
        lambda n: n + 1, lambda n: 1 - n, lambda n: 2 * n, lambda n: n / 3, lambda n: 3 / n, lambda n: -n,
        lambda n: n**2,
    ],
)  # fmt: skip
def test_arithmetic_with_a_number_is_refused(arithmetic: Callable[[Number], object]) -> None:
    with pytest.raises(NotRecordable, match="arithmetic"):
        arithmetic(Number(0.5))


def test_a_tensor_from_elsewhere_is_refused(kernel: Kernel) -> None:
    stray = torch.empty(4, device="meta")

    def body(x: Tensor) -> Tensor:
        out = torch.empty(4)
        launch(kernel, 1, x, out, stray)
        return out

    with pytest.raises(NotRecordable, match="neither given nor allocated"):
        recording(torch.rand(4), body)


def test_an_output_that_nothing_writes_is_refused() -> None:
    with pytest.raises(NotRecordable, match="an output that no launch writes"):
        recording(torch.rand(4), lambda x: torch.empty(4))


def test_a_gradient_with_gaps_is_refused(kernel: Kernel) -> None:
    def backward(grad: Tensor, x: Tensor) -> Tensor:
        out = torch.empty(8)
        launch(kernel, 1, grad, out)
        return out

    note = Recorder()
    with note:
        (x,) = note.like_each([FOUR])
        out = torch.empty(4)
        launch(kernel, 1, x, out)
        forward = Pass(note.take(), [x], [], [out])
        made = backward(out, x)
        with pytest.raises(NotRecordable, match="gaps"):
            Recording(note, [forward, Pass(note.take(), [], [], [None, made[2:]])], CPU)


def test_outputs_that_are_filled(kernel: Kernel) -> None:
    def body(x: Tensor) -> Tensor:
        launch(kernel, 1, x)
        return torch.ones(2, 3)

    assert torch.equal(play(recording(FOUR, body), FOUR)[0], torch.ones(2, 3))


def test_where_a_replays_memory_lies(kernel: Kernel) -> None:
    """What the backward reads is kept, the rest is scratch, and no two tensors overlap."""

    def body(x: Tensor) -> Tensor:
        kept, scratch, out = torch.empty(100), torch.empty(50), torch.empty(8)
        body.kept = kept  # type: ignore[attr-defined]
        launch(kernel, 1, x[1:], kept, kept[10:], scratch, out[2:], 3, None)
        return out

    def backward(grad: Tensor, x: Tensor) -> Tensor:
        da = torch.empty(4)
        launch(kernel, 1, grad, x, body.kept[5:], torch.empty(7), da)  # type: ignore[attr-defined]
        return da

    found = recording(torch.rand(4), body, backward)
    assert found.saved == [0]
    for _ in range(2):
        x = torch.rand(4)
        out, kept = play(found, x)
        assert kept is not None
        assert kept.nbytes == 512
        a, b, c, scratch, d, *numbers = kernel.launches[-1]
        begin = kept.data_ptr()
        assert (a, b, c) == (x.data_ptr() + 4, begin, begin + 40)
        assert d == out.data_ptr() + 8
        assert numbers == [3, None]
        assert scratch not in range(begin, begin + 512)
        grad, da = torch.rand(8), torch.empty(4)
        assert found.backward is not None
        addresses = [g.data_ptr() for g in (grad, x, da)]
        found.backward.play(kept, None, [grad, x], [da], addresses, ())
        first, again, inside, _, last = kernel.launches[-1]
        assert (first, again, inside, last) == (grad.data_ptr(), x.data_ptr(), begin + 20, da.data_ptr())


def test_constants_are_filled_once(kernel: Kernel) -> None:
    def body(x: Tensor) -> Tensor:
        out = torch.empty(4)
        launch(kernel, 1, x, torch.ones(5), torch.zeros(3), out)
        return out

    found = recording(torch.rand(4), body)
    play(found, torch.rand(4))
    constants = found.constants()
    assert constants is not None
    assert torch.equal(constants[:20].view(torch.float32), torch.ones(5))
    assert torch.equal(constants[256:268].view(torch.float32), torch.zeros(3))
    _, ones, zeros, _ = kernel.launches[-1]
    assert (ones, zeros) == (constants.data_ptr(), constants.data_ptr() + 256)
    constants[:20] = 7  # as they are read only, nothing fills them again
    play(found, torch.rand(4))
    assert found.constants() is constants
    assert constants[0] == 7


class Counting(Kernel):
    """Whether what it is given as counters is zero."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(x: Tensor, counters: Tensor, *_: Any) -> None:
            count = counters.untyped_storage().nbytes() // 4
            whole = torch.empty(0, dtype=torch.int32).set_(counters.untyped_storage(), 0, (count,))
            self.launches.append([counters.storage_offset(), whole.tolist()])
            whole.fill_(5)

        return run


def test_counters_start_from_zero() -> None:
    kernel = Counting()

    def body(x: Tensor) -> Tensor:
        out = torch.empty(4)
        for n in (2, 3):
            launch(kernel, 1, x, torch.zeros(n, dtype=torch.int32), out)
        return out

    found = recording(torch.rand(4), body)
    for _ in range(2):
        play(found, torch.rand(4))
    assert kernel.launches == [[0, [0] * 5], [2, [5] * 5]] * 2


@pytest.mark.parametrize("counters", [0, 3])
def test_counters_that_the_first_launch_clears(counters: int, kernel: Kernel) -> None:
    def body(x: Tensor) -> Tensor:
        out, note = torch.empty(4), thread.recorder
        launch(kernel, 1, x, *note.clearing())
        assert note.clearing() == (None, 0)
        if counters:
            launch(kernel, 1, x, torch.zeros(2, dtype=torch.int32), None)
            launch(kernel, 1, x, torch.zeros(1, dtype=torch.int32), None)
        launch(kernel, 1, x, out)
        return out

    found = recording(torch.rand(4), body)
    assert found.forward._counters is None
    play(found, torch.rand(4))
    clears = kernel.launches[0]
    assert clears[2] == counters
    if counters:
        begin = clears[1]
        assert [after[1] for after in kernel.launches[1:3]] == [begin, begin + 8]
    else:
        assert clears[1] is None


def test_gradients_lie_as_their_storages_do(kernel: Kernel) -> None:
    note = Recorder()
    with note:
        (x,) = note.like_each([FOUR])
        out, both, single = torch.empty(4), torch.empty(2, 3), torch.empty(5)
        launch(kernel, 1, x, out)
        forward = Pass(note.take(), [x], [], [out])
        grad = note.like(out)
        launch(kernel, 1, grad, both[1], single, both)
        made = [None, both[1], single, both[0]]
        found = Recording(note, [forward, Pass(note.take(), [grad], [], made)], CPU)
    begins, grads = found.gradients.make()
    assert [g.shape for g in grads] == [(3,), (5,), (3,)]
    assert grads[0].data_ptr() == grads[2].data_ptr() + 12 == begins[0].data_ptr() + 12
    assert all(b.data_ptr() % 16 == 0 for b in begins)
    x = torch.rand(4)
    assert found.backward is not None
    found.backward.play(None, None, [x], begins, [g.data_ptr() for g in (x, *begins)], ())
    assert kernel.launches[-1][1:] == [g.data_ptr() for g in (grads[0], grads[1], grads[2])]


def test_an_int_is_launched_as_a_float(kernel: Kernel) -> None:
    """Triton would compile it into the kernel, which then serves all numbers."""
    note = Recorder()
    with note:
        (x,) = note.like_each([FOUR])
        out, number = torch.empty(4), Number(1)
        launch(kernel, 1, x, out, number)
        found = Recording(note, [Pass(note.take(), [x], [number], [out])], CPU)
    x, y = torch.rand(4), torch.rand(4)
    found.forward.play(None, None, [x], [y], [x.data_ptr(), y.data_ptr()], (1,))
    assert type(kernel.launches[-1][2]) is float


BEGIN = """
import torch, triton
from bench.measure import driver_stub
from bench.tools import host
from ggam_fast import GGAMHead, recorded
from ggam_fast.functional import fused_ggam_loss

def step(weight):
    loss, out = fused_ggam_loss(head, x, target, guidance_weight=weight)
    loss.backward()
    return out

with host.without_kernels():
    head = GGAMHead(32, 6, hidden_size=8)
    x, target = torch.rand(4, 32, 3, 3).requires_grad_(), torch.randint(6, (4,))
    step(1)  # an int, which Triton would compile in
    (recording,) = recorded._recordings.values()
    tapes = [recording.forward, recording.backward]
    launches = [launch for tape in tapes for launch in tape.launches]
    assert launches
    assert all(tape.compiled for tape in tapes)
    before = driver_stub.launch_count()
"""
REPLAY = """
    step(0.25)
    assert driver_stub.launch_count() - before == len(launches)
    called = []
    for tape in tapes:
        names = tape._launch_all.__globals__
        for i, launch in enumerate(tape.launches):
            assert names[f"call{i}"] is launch.run.launch
            names[f"call{i}"] = lambda *arguments: called.append(arguments)
    before = driver_stub.launch_count()
    out = step(0.125)
    assert driver_stub.launch_count() == before
    assert len(called) == len(launches)

    def flat(arguments):
        for a in arguments:
            yield from flat(a) if isinstance(a, tuple) else [a]

    for launch, arguments in zip(launches, called):
        assert arguments[:4] == (launch.programs, 1, 1, 0)
        values = list(flat(arguments))[-len(launch.values):]
        dynamic = {i for i, *_ in launch.dynamic}
        for i, (value, fixed) in enumerate(zip(values, launch.values)):
            assert value is not None if i in dynamic else value == fixed
    passed = {a for arguments in called for a in flat(arguments) if isinstance(a, (int, float))}
    buffers = [b for m in head.classifier for b in m.buffers()]
    for tensor in [x, target, *head.parameters(), *buffers, *out]:
        assert tensor.data_ptr() in passed
    assert 0.125 in passed
"""
SCRATCH = """
    class Run:
        global_scratch_size, profile_scratch_size = 64, 0

        def __init__(self):
            self.launch = lambda *arguments: None

        def __call__(self, *arguments):
            ran.append(arguments)
            self.launch(*arguments)

    ran = []
    for launch in launches:
        launch.run = Run()
    for tape in tapes:
        tape._launch_all = None
    step(0.25)
    assert driver_stub.launch_count() == before
    assert len(ran) == len(launches)
    for launch, arguments in zip(launches, ran):
        assert arguments[:9] == (launch.programs, 1, 1, 0, launch.function, launch.packed, None, None, None)
        assert len(arguments) == 9 + len(launch.values)
"""
HOOKED = """
    seen = []
    triton.knobs.runtime.launch_enter_hook.add(seen.append)
    step(0.25)
    assert len(seen) == len(launches)
    assert driver_stub.launch_count() - before == len(launches)
"""


@pytest.mark.skipif(
    torch.cuda.is_available() or driver_stub.compiler() is None,
    reason="the stub of the driver needs a C compiler, and no GPU",
)
@pytest.mark.parametrize("then", [REPLAY, SCRATCH, HOOKED], ids=["replay", "scratch", "hooked"])
def test_launches_into_the_stub(then: str) -> None:
    """In a process without the interpreter: a second replay goes through the innermost call of Triton's
    launcher, with the addresses of the step; through the launcher where that has memory to allocate; through
    Triton where a profiler looks on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + then], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
