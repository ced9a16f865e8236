"""Bytes and seconds of the floor."""

import pytest
import torch

from bench.measure import roofline
from bench.suite.cases import PASSES, Case


@pytest.mark.parametrize(
    ("case", "size"),
    [
        (Case(32, 2048, 14, 14), 25_690_112),  # 25.7 MB, as the method says
        (Case(32, 2048, 14, 14, torch.float32), 51_380_224),
        (Case(1, 1024, 32, 32, layout="nlc"), 2_097_152),
    ],
    ids=str,
)
def test_bytes(case: Case, size: int) -> None:
    """bytes(A) is what torch allocates. The bytes of the passes are multiples of it."""
    assert case.bytes == size
    assert torch.empty(case.n, case.c, case.h, case.w, dtype=case.dtype).nbytes == size
    counted = {run: roofline.floor_bytes(size, run) / size for run in (*PASSES, "copy")}
    assert counted == {"fwd": 1, "fwd_beta": 2, "beta": 2, "step": 3, "copy": 2}


def test_floor() -> None:
    size = Case(128, 2048, 14, 14).bytes
    assert roofline.floor_seconds(size, "step", 3e12) == pytest.approx(3 * 102_760_448 / 3e12)
    with pytest.raises(ValueError, match="copy_bandwidth"):
        roofline.floor_seconds(size, "step", 0.0)
