"""An image's addresses are linear in its index, also past 2^31 elements.

The programs of images 0, 1 and 2^28 run in Triton's interpreter, which only notes their addresses.  With at
least 9 values an image, the last image lies past 2^31.  Nothing is loaded or stored, so nothing is allocated.
"""

from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.trace import needs_interpreter, traced

pytest.importorskip("triton")

from triton.runtime import interpreter

from ggam_fast.backends.triton import TRITON, launch
from tests.kernels.test_reproducible import OPERATORS, Inputs

pytestmark = needs_interpreter
N, C, L, FAR = 2, 35, 9, 2**28


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "product"])  # its rows are in tiles
def test_addresses_are_linear(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.zeros(N, C, L).bfloat16()
    if layout == "channels_last":
        a = a.transpose(1, 2).contiguous().transpose(1, 2)
    x = {"a": a, "g": torch.zeros(N, C, L)}
    x |= {k: torch.zeros(N, size) for k, size in (("t", L), ("s", C), ("v", C), ("extra", L))}
    x |= {"total": torch.zeros(N), "index": torch.zeros(N, C, dtype=torch.int64)}
    whole, first, launches = interpreter.GridExecutor.__call__, [0], []

    def program_id(self: Any, axis: int) -> Any:
        number = np.array([self.grid_idx[axis] + first[0]], dtype=np.int32)
        return interpreter.TensorHandle(number, interpreter.tl.int32)

    def images(self: Any, *arguments: Any, **constants: Any) -> None:
        blocks, rest = divmod(self.grid[0], N)
        assert rest == 0
        self.grid, runs = (blocks,), []
        for image in (0, 1, FAR):
            first[0] = image * blocks
            before = len(trace.loads), len(trace.stores)
            whole(self, *arguments, **constants)
            accesses = trace.loads[before[0] :] + trace.stores[before[1] :]
            runs.append(np.concatenate([access.addresses.ravel() for access in accesses]))
        launches.append(runs)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", program_id)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", images)
    with traced(execute=False) as trace:
        OPERATORS[name](Inputs(x, slice(None)))
    assert launches
    for at_0, at_1, at_far in launches:
        assert (at_1 != at_0).any()  # channel_sum counts images backwards
        assert np.array_equal(at_far - at_0, FAR * (at_1 - at_0))


class Noted:
    """Notes launches instead of launching, as the recorder of a step does."""

    def __init__(self) -> None:
        self.launches: list[tuple[int, dict[str, Any]]] = []

    def clearing(self) -> tuple[None, int]:
        return None, 0

    def launch(self, kernel: Any, programs: int, arguments: Any, constants: dict[str, Any]) -> None:
        self.launches.append((programs, constants))


@pytest.mark.parametrize(("channels", "positions"), [(16384, 16384), (16384, 49), (7, 16384)])
@pytest.mark.parametrize("name", OPERATORS)
def test_launches_of_large_maps(name: str, channels: int, positions: int) -> None:
    """Grids and tiles are within what CUDA and Triton allow: 2^31 programs, 2^20 elements."""
    n, meta = 1024, {"device": "meta"}
    a = torch.empty(n, channels, positions, dtype=torch.bfloat16, **meta)
    x = {"a": a, "g": a.float()}
    sizes = (("t", positions), ("s", channels), ("v", channels), ("extra", positions))
    x |= {k: torch.empty(n, size, **meta) for k, size in sizes}
    x |= {"total": torch.empty(n, **meta), "index": torch.empty(n, channels, dtype=torch.int64, **meta)}
    launch.thread.recorder = noted = Noted()  # type: ignore[assignment]
    try:
        if name == "product":
            TRITON.product([x["s"]], torch.empty(channels, 200, **meta))
        else:
            OPERATORS[name](Inputs(x, slice(None)))
    finally:
        launch.thread.recorder = None
    # Of so many channels torch makes the softmax.
    assert noted.launches or (channels > 8192 and name in ("guidance", "channel softmax", "softmax_grad"))
    for programs, constants in noted.launches:
        blocks = [value for key, value in constants.items() if key.startswith("BLOCK")]
        assert 0 < programs < 2**31
        assert np.prod(blocks) <= 2**20
        assert all(block & (block - 1) == 0 for block in blocks)
