"""A launch is remembered for arguments that Triton compiles alike, and for no others."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast import launch, ops


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
    monkeypatch.setattr(launch, "_launches", {})
    monkeypatch.setattr(launch.triton, "JITFunction", Kernel)
    return Kernel()


def test_the_second_launch_is_of_addresses_in_the_kernels_order(kernel: Kernel) -> None:
    x, y = torch.zeros(8), torch.zeros(8)
    launch.launch(kernel, 3, x, None, 0.5, 7, B=2, num_warps=4, A=1)
    launch.launch(kernel, 3, x, None, 0.5, 7, B=2, num_warps=4, A=1)
    launch.launch(kernel, 3, y, None, 0.25, 7, B=2, num_warps=4, A=1)
    ((grid, arguments, constants),) = kernel.compilations
    assert grid == (3,)
    assert arguments[0] is x
    assert arguments[1:] == (None, 0.5, 7)
    assert constants == {"A": 1, "B": 2, "num_warps": 4}
    assert kernel.launches == [
        ((3, 1, 1), (x.data_ptr(), None, 0.5, 7, 1, 2)),
        ((3, 1, 1), (y.data_ptr(), None, 0.25, 7, 1, 2)),
    ]


def test_what_is_another_launch(kernel: Kernel) -> None:
    """Triton specialises for types, alignment and numbers: what it made for one is wrong for another."""
    memory = torch.zeros(64)
    base: list[Any] = [memory[:8], memory[:8], 0.5, 7]
    constants = {"A": 1, "B": 2, "num_warps": 4}
    launch.launch(kernel, 1, *base, **constants)
    changes: list[tuple[int, list[Any], dict[str, int]]] = [
        (2, base, constants),
        (1, [memory[:8].half(), *base[1:]], constants),
        (1, [memory[1:9], *base[1:]], constants),  # not aligned to 16 bytes
        (1, [memory[:8].as_subclass(Elsewhere), *base[1:]], constants),
        (1, [base[0], None, *base[2:]], constants),
        (1, [*base[:3], 1], constants),
        (1, [*base[:3], 2**31], constants),
        (1, base, constants | {"A": 3}),
        (1, base, constants | {"num_warps": 8}),
        (1, base, {"A": 1, "B": 2, "num_stages": 4}),
    ]
    for programs, arguments, others in changes:
        launch.launch(kernel, programs, *arguments, **others)
    launch.launch(Kernel(), 1, *base, **constants)
    assert len(kernel.compilations) == 1 + len(changes)
    assert not kernel.launches


@pytest.mark.gpu
def test_on_a_gpu(device: torch.device) -> None:
    """Aligned and not, again and again; a tensor left on the CPU is refused every time."""
    memory = torch.randn(64, 130, device=device)

    def rows(first: int) -> Tensor:
        return memory.flatten()[first : first + 64 * 128].view(64, 128)

    w = torch.randn(128, 32, device=device)
    for first in (0, 1, 0, 16, 3, 1):
        torch.testing.assert_close(ops.TRITON.product([rows(first)], w)[0], rows(first) @ w)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="input's device"):
            ops.TRITON.product([rows(0)], w.cpu())
