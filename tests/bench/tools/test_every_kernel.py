"""Every kernel of the package is launched."""

import sys

import pytest
import torch

pytest.importorskip("triton")

from bench.tools import every_kernel


class Noted:
    """A kernel that notes its launch."""

    def __init__(self, name: str, launched: set[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        return lambda *arguments, **constants: self.launched.add(self.name)


def test_no_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    defined: set[str] = set()
    for module in [m for name, m in sys.modules.items() if name.startswith("ggam_fast.kernels.")]:
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            defined.add(name)
            monkeypatch.setattr(module, name, Noted(name, launched))
    every_kernel.launch_all(torch.rand(2, 32, 9))
    assert defined
    assert launched == defined
