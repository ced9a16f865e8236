"""Shared by all tests: the device, Triton's interpreter where there is no GPU, one seed per test."""

import os
import zlib

import pytest
import torch

if not torch.cuda.is_available():
    # Before ggam_fast is imported: its kernels then run on the CPU, one program after another.
    os.environ.setdefault("TRITON_INTERPRET", "1")
for name in ("GGAM_FAST_BACKEND", "GGAM_FAST_CHECKS"):
    os.environ.pop(name, None)


@pytest.fixture
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Fresh random inputs for each test, the same in every run and in every order."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
