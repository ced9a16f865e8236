"""The kernels of one call and the gaps between them."""

import pytest
import torch

from bench.tools import kernel_times


def test_kernels_of_one_call() -> None:
    found = [kernel_times.Kernel(name, at, at + 3) for at, name in ((0, "a"), (20, "a"), (4, "b"), (25, "b"))]
    last = kernel_times.one_call(found, 2)
    assert [k.name for k in last] == ["a", "b"]
    assert last[0].start == 20
    assert kernel_times.lines(last)[-1].split() == ["2.00", "6.00", "all"]
    with pytest.raises(ValueError, match="4 kernels do not divide into 3 equal calls"):
        kernel_times.one_call(found, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test needs a machine without a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel_times.main([]) == 3
    assert "needs a GPU" in capsys.readouterr().err
