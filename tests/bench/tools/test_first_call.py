"""The first step of a new process is timed."""

from pathlib import Path

import pytest
import torch

from bench.suite.cases import Case
from bench.tools import first_call

SMALL = Case(2, 32, 3, 3, torch.float32)


@pytest.mark.slow
def test_a_first_step_of_a_new_process(tmp_path: Path) -> None:
    found = first_call.spawn(SMALL, "fused", str(tmp_path))
    assert found.keys() == {"device and inputs", "first step", "second step"}
    assert all(seconds > 0 for seconds in found.values())


def test_a_process_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_call.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the process of the first call failed"):
        first_call.spawn(SMALL, "fused", str(tmp_path))
