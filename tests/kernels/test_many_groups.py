"""Fused kernels over many groups of images: what a program reads, another may have stored a moment before.

On a GPU all programs run at once, again and again; under the interpreter one after another (in random orders
in `test_interleaving`), where this shows that the cases are sound.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast import ops

ON_GPU = torch.cuda.is_available()
N, C, L = (64, 520, 49) if ON_GPU else (3, 40, 9)
REPEATS, IMAGES = (20, (1, 3)) if ON_GPU else (1, (1,))
NORMS = ("softmax", "sum", "sigmoid")


@pytest.fixture(params=["nchw", "channels_last"])
def features(request: pytest.FixtureRequest, device: torch.device) -> Tensor:
    a = torch.randn(N, C, L).abs().to(device, torch.bfloat16)
    return a.transpose(1, 2).contiguous().transpose(1, 2) if request.param == "channels_last" else a


def assert_same_bits(call: Any, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups of a few images and programs that overtake one another as with one program."""
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_programs", lambda *_: 1)
        expected = call()
    monkeypatch.setattr(ops.plan, "GROUP_BYTES", images * C * L * 2)
    for _ in range(REPEATS):
        for found, wanted in zip(call(), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("pool_type", ["avg", "max", "flatten", ""])
@pytest.mark.parametrize("norm", NORMS)
def test_forward(
    norm: str, pool_type: str, images: int, features: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = torch.randn(N, C).softmax(-1).to(features.device)
    assert_same_bits(lambda: ops.TRITON.attended(features, s, norm, pool_type), images, monkeypatch)


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize(("rows", "extra"), [(1, True), (1, False), (2, False)])
@pytest.mark.parametrize("norm", NORMS)
def test_backward(
    norm: str, rows: int, extra: bool, images: int, features: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    v, x, t = (torch.randn(shape).to(features.device) for shape in ((2, N, C), (N, L), (N, L)))
    t, total = t.softmax(-1), torch.rand(N).to(features.device)

    def backward() -> list[Tensor]:
        pairs = ops.TRITON.attention_backward(
            features, list(v)[:rows], 0.5, x if extra else None, t, total, norm
        )
        return [found for pair in pairs for found in pair]

    assert_same_bits(backward, images, monkeypatch)
