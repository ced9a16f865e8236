"""Setup of all tests: the number of processes, the device (Triton's interpreter without a GPU), seeds."""

import os
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    # Before ggam_fast is imported: its kernels then run on the CPU, one program after another.
    os.environ.setdefault("TRITON_INTERPRET", "1")
for name in ("GGAM_FAST_BACKEND", "GGAM_FAST_CHECKS"):
    os.environ.pop(name, None)


MOST_ON_A_GPU = 8  # processes: each needs its own part of the device's memory


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest` without paths takes all cores if pytest-xdist is installed; `-n 0` keeps it in one process."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = "auto"
        if torch.cuda.is_available():
            config.option.maxprocesses = config.option.maxprocesses or MOST_ON_A_GPU
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each process: together they fill the cores


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Fresh random inputs for each test, the same in every run and in every order."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


class PoisonedTorch:
    """torch for the one module that allocates; nothing else of torch, or of its compiler, sees its `empty`"""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        out = torch.empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer the operators allocate starts as NaN, so that an unwritten element shows."""
    from ggam_fast.backends.triton import launch

    monkeypatch.setattr(launch, "torch", PoisonedTorch())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("fuzz") and "fuzz" not in item.config.option.markexpr:
        pytest.skip("runs with -m fuzz")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
