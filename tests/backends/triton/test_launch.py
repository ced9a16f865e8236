"""A kernel's compiled form is used again for arguments of the same kinds, and only for those."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from ggam_fast import checks
from tests.parity import relative_error

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.backends.triton import TRITON, launch

ROOT = Path(__file__).resolve().parents[3]


class Kernel:
    """Keeps what it is asked for."""

    arg_names = ("x_ptr", "y_ptr", "scale", "n", "A", "B")

    def __init__(self) -> None:
        self.compilations: list[Any] = []
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.compilations.append((grid, arguments, constants))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.launches.append((grid, arguments))


class Elsewhere(Tensor):
    def get_device(self) -> int:
        return 1


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch.triton, "JITFunction", Kernel)
    monkeypatch.setattr(launch, "serve_all_alike", lambda compiled, arguments: True)
    return Kernel()


def test_the_second_launch_is_of_addresses_in_the_kernels_order(kernel: Kernel) -> None:
    x, y = torch.zeros(8), torch.zeros(8)
    for programs in (3, 5):
        launch.launch(kernel, programs, x, None, 0.5, 7, B=2, num_warps=4, A=1)
    launch.launch(kernel, 6, y, None, 0.25, 9, B=2, num_warps=4, A=1)
    assert len(kernel.compilations) == 1
    assert kernel.compilations[0][0] == (3,)
    assert kernel.compilations[0][1][0] is x
    assert kernel.launches == [
        ((5, 1, 1), (x.data_ptr(), None, 0.5, 7, 1, 2)),
        ((6, 1, 1), (y.data_ptr(), None, 0.25, 9, 1, 2)),
    ]


def test_what_is_compiled_anew(kernel: Kernel) -> None:
    memory = torch.zeros(64)
    base: list[Any] = [memory[:8], memory[:8], 0.5, 7]
    constants = {"A": 1, "B": 2, "num_warps": 4}
    launch.launch(kernel, 1, *base, **constants)
    changes: list[tuple[list[Any], dict[str, int]]] = [
        ([memory[:8].half(), *base[1:]], constants),
        ([memory[1:9], *base[1:]], constants),  # not aligned to 16 bytes
        ([memory[:8].as_subclass(Elsewhere), *base[1:]], constants),
        ([base[0], None, *base[2:]], constants),
        ([*base[:3], 1], constants),
        ([*base[:3], 16], constants),
        ([*base[:3], 2**31], constants),
        (base, constants | {"A": 3}),
        (base, constants | {"num_warps": 8}),
        (base, {"A": 1, "B": 2, "num_stages": 4}),
    ]
    for arguments, others in changes:
        launch.launch(kernel, 1, *arguments, **others)
    launch.launch(Kernel(), 1, *base, **constants)
    assert len(kernel.compilations) == 1 + len(changes)
    assert not kernel.launches


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
@pytest.mark.parametrize("argument", [0, 1])
def test_each_pointer_off_its_16_bytes_is_compiled_anew(kernel: Kernel, argument: int, offset: int) -> None:
    memory = torch.zeros(128, dtype=torch.uint8)
    assert memory.data_ptr() % 16 == 0

    def launched(begin: int) -> None:
        pointers = [memory[:8], memory[:8]]
        pointers[argument] = memory[begin : begin + 8]
        launch.launch(kernel, 1, *pointers, 0.5, 7, A=1, B=2)

    launched(0)
    launched(offset)
    assert len(kernel.compilations) == 2
    launched(16)
    launched(32 + offset)
    assert len(kernel.compilations) == 2
    assert len(kernel.launches) == 2


class OnGpu(Tensor):
    is_cuda = True  # type: ignore[assignment]


def test_what_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not compiled yet, and what was launched on memory of the host: pinned, Triton takes it."""
    compiled = Mock(spec=launch.triton.compiler.CompiledKernel)
    host = torch.zeros(8)
    gpu = host.as_subclass(OnGpu)
    assert launch.serve_all_alike([compiled], (gpu, None, 0.5, 7, gpu))
    assert not launch.serve_all_alike([compiled], (gpu, None, 0.5, 7, host))
    assert not launch.serve_all_alike([None], (gpu,))
    assert not launch.serve_all_alike([object()], (gpu,))
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch.triton, "JITFunction", Kernel)
    kernel = Kernel()
    for _ in range(2):
        launch.launch(kernel, 1, host, host, 0.5, 7, A=1, B=2)
    assert len(kernel.compilations) == 2
    assert not launch._compiled


PROGRAM = """
import itertools
from ggam_fast.backends.triton import launch
from ggam_fast.kernels import product
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

kernel = product.product_kernel
backend = make_backend(GPUTarget("cuda", 90, 32))
bind = create_function_from_signature(kernel.signature, kernel.params, backend)
numbers = [0, 1, 2, 8, 15, 16, 17, 48, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, 2**33, -1, -16]
constants = dict.fromkeys([p.name for p in kernel.params if p.is_constexpr], 1)
found = {}
for m, n in itertools.product(numbers, repeat=2):
    _, specialization, _ = bind(*[None] * 9, m, n, *[3] * 5, **constants)
    found.setdefault((launch.kind(m), launch.kind(n)), set()).add(str(specialization))
assert len(found) == 25
assert all(len(s) == 1 for s in found.values()), found
"""


def test_kinds_are_as_fine_as_what_triton_specialises_for() -> None:
    """In a process without the interpreter, which specialises for nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
def test_on_a_gpu(device: torch.device) -> None:
    """Aligned and not, again and again; a tensor left on the CPU is refused every time."""
    memory = torch.randn(64, 130, device=device)

    def rows(first: int) -> Tensor:
        return memory.flatten()[first : first + 64 * 128].view(64, 128)

    w = torch.randn(128, 32, device=device)
    for first in (0, 1, 0, 16, 3, 1):
        found, exact = TRITON.product([rows(first)], w)[0], rows(first).double() @ w.double()
        assert relative_error(found, exact) <= 1e-6
    for _ in range(2):
        with pytest.raises(RuntimeError, match="input's device"):
            TRITON.product([rows(0)], w.cpu())
