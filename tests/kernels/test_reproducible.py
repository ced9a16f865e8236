"""An image has the same bits every run and in every batch, and does not affect other images."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.backends.torch import CamTerms
from ggam_fast.backends.triton import TRITON as S

N, C, L = 3, 300, 49


class Inputs:
    """All that the operators take, for the given rows of one batch."""

    def __init__(self, x: dict[str, Tensor], rows: slice | list[int]) -> None:
        self.a, self.g, self.t, self.s, self.v, self.extra, self.total, self.index = (
            v[rows] if isinstance(rows, slice) else torch.empty_like(v).copy_(v[rows]) for v in x.values()
        )


CAM = ("standardized", 0.7, "symmetric", 0.3)

OPERATORS: dict[str, Callable[[Inputs], Tensor | tuple[Tensor, ...]]] = {
    "spatial_sum": lambda x: S.spatial_sum(x.a, x.t, 0.5),
    "mean": lambda x: S.spatial_sum(x.a, None, 1 / L),
    "channel_sum": lambda x: S.channel_sum(x.a, x.s),
    "softmax": lambda x: S.spatial_attention(x.a, x.s, "softmax"),
    "sum": lambda x: S.spatial_attention(x.a, x.s, "sum"),
    "sigmoid": lambda x: S.spatial_attention(x.a, x.s, "sigmoid"),
    "softmax grad": lambda x: S.spatial_attention_grad(x.a, x.v, 1.0, x.extra, x.t, x.total, "softmax"),
    "sum grad": lambda x: S.spatial_attention_grad(x.a, x.v, 1.0, None, x.t, x.total, "sum"),
    "sigmoid grad": lambda x: S.spatial_attention_grad(x.a, x.v, 1.0, x.extra, x.t, x.total, "sigmoid"),
    "max_pool": lambda x: S.max_pool(x.a, x.t),
    "position_scatter": lambda x: S.position_scatter(x.a[:, :, 0].float(), x.index, L),
    "hadamard": lambda x: S.hadamard(x.a, x.t, x.s, False),
    "hadamard by channel": lambda x: S.hadamard(x.a, None, x.s, True),
    "grad_cam_means": lambda x: S.grad_cam_means(x.a, x.g, x.t),
    "attended": lambda x: S.attended(x.a, x.s, "softmax", "avg"),
    "attended max": lambda x: S.attended(x.a, x.s, "sigmoid", "max"),
    "attention_backward": lambda x: sum(
        S.attention_backward(x.a, [x.v, x.s], 0.5, None, x.t, x.total, "softmax"), ()
    ),
    "product": lambda x: S.product(
        [x.a[:, :, 0].float()], torch.linspace(-1, 1, 20 * C, device=x.a.device).view(C, 20)
    )[0],
    "guidance": lambda x: S.guidance(x.a[:, :, 0].float(), CamTerms(x.s, x.t, x.extra, x.v), x.v, L, *CAM),
    "channel softmax": lambda x: S.softmax(x.a[:, :, 0].float()),
    "softmax_grad": lambda x: S.softmax_grad(x.a[:, :, 0].float(), x.s, x.v),
    "features_grad": lambda x: S.features_grad(x.a, "max", x.a[:, :, 0].float(), x.index, x.t, x.t, x.s, x.v),
    "features_grad dense": lambda x: S.features_grad(x.a, "", x.a, x.index, x.t, x.t, x.s, x.v),
}


def outputs(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    found = [found] if isinstance(found, Tensor) else list(found)
    return [x for x in found if len(x)]  # no index but of maxima


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_bits(name: str, layout: str, device: torch.device) -> None:
    a = torch.randn(N, C, L, device=device).bfloat16()
    if layout == "channels_last":
        a = a.transpose(1, 2).contiguous().transpose(1, 2)
    x = {"a": a, "g": torch.randn(N, C, L, device=device)}
    x |= {k: torch.rand(N, size, device=device) for k, size in (("t", L), ("s", C), ("v", C), ("extra", L))}
    x |= {"total": torch.rand(N, device=device), "index": torch.randint(L, (N, C), device=device)}

    def run(rows: slice | list[int] = slice(None), **changed: Tensor) -> list[Tensor]:
        return outputs(OPERATORS[name](Inputs({**x, **changed}, rows)))

    whole = run()
    for again, one in zip(run(), whole, strict=True):
        assert torch.equal(again, one), "another run gave other bits"
    for rows in (slice(2, 3), slice(1, None)):
        for part, one in zip(run(rows), whole, strict=True):
            assert torch.equal(part, one[rows]), "an image depends on its batch"
    for moved, one in zip(run([2, 0, 1]), whole, strict=True):
        assert torch.equal(moved, one[[2, 0, 1]]), "an image depends on its place"
    for value in (float("nan"), float("inf"), 3e38):
        bad = a.clone()
        bad[1] = value
        others = [0, 2]
        found = run(a=bad)
        for spoilt, one in zip(found, whole, strict=True):
            assert torch.equal(spoilt[others], one[others]), f"{value} reached another image"
        assert not all(torch.equal(f[1], one[1]) for f, one in zip(found, whole, strict=True))
