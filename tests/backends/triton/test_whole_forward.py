"""The closed form on the Triton backend, against the same in float64."""

import zlib

import pytest
import torch

from ggam_fast.backends.torch import spatial_norm
from ggam_fast.closed_form import ChannelMLP, Options, attend

from .cases import FUSED, check, make, weights  # first: it skips without triton

from ggam_fast import checks  # isort: skip
from ggam_fast.backends.triton import TRITON as S  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")

NORMS = ("softmax", "sum", "sigmoid")


@FUSED
@pytest.mark.parametrize("scale", ["unit_mean", "printed"])
@pytest.mark.parametrize("pool_type", ["avg", "max", "", "flatten"])
def test_the_whole_forward(
    n: int,
    c: int,
    l: int,
    layout: str,
    dtype: torch.dtype,
    pool_type: str,
    scale: str,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    turn = zlib.crc32(request.node.nodeid.encode())  # spreads norms over the cases
    norm = NORMS[turn % 3]
    a = make(n, c, l, device, dtype, layout).abs()
    j = 1 + turn % 40
    # Logits of some units: a softmax turns their errors, which grow with them, into relative ones.
    w1, b1, w2, b2 = (torch.randn(x, device=device) / x[-1] ** 0.5 for x in ((j, c), (j,), (c, j), (c,)))
    mlp, options = ChannelMLP(w1, b1, w2, b2), Options("channel_spatial", norm, pool_type, scale)
    pooled, logits, t, _, mean, hidden, total, peak, index, multiplied, s = attend(S, a, mlp, options)
    kappa = 1 if scale == "printed" or norm == "sigmoid" else l

    exact = a.double()
    g = exact.mean(2)
    h = torch.relu(g @ w1.double().t() + b1.double())
    e = h @ w2.double().t() + b2.double()
    u = torch.einsum("ncl,nc->nl", exact, e.softmax(1))
    expected, _ = spatial_norm(u, norm)
    assert s is not None
    for found, wanted in (
        (mean, g), (hidden, h), (logits, e), (s, e.softmax(1)), (t, expected), (total, u.sum(1)),
    ):  # fmt: skip
        check(found, wanted, 1e-5)
    assert torch.equal(multiplied, t[:0, 0] if kappa == 1 else kappa * t)
    d = kappa * exact * expected.unsqueeze(1)
    if pool_type == "avg":
        check(pooled, d.mean(2), 1e-5)
    elif pool_type == "max":
        check(pooled, d.amax(2), 1e-5)
        assert torch.equal(peak, a.float().gather(2, index.unsqueeze(2)).squeeze(2))
    else:
        # Triton's interpreter cuts bfloat16 off instead of rounding it.
        half = torch.finfo(dtype).eps * (1.0 if checks.TRITON_INTERPRETED else 0.5)
        check(pooled, d, 1e-5 if pool_type == "flatten" or dtype == torch.float32 else half)
        assert pooled.dtype == (torch.float32 if pool_type == "flatten" else dtype)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_an_image_is_alone(layout: str, device: torch.device) -> None:
    """Its results do not depend on its batch, and what is not finite in it stays there."""
    a = make(3, 300, 49, device, torch.bfloat16, layout)
    t, s = weights(3, 49, device), weights(3, 300, device)
    bad = a.clone()
    bad[1] = float("nan")
    for stage in (
        lambda x, rows: S.spatial_sum(x, t[rows], 0.5),
        lambda x, rows: S.spatial_attention(x, s[rows], "softmax")[0],
        lambda x, rows: S.max_pool(x, t[rows])[0],
        lambda x, rows: S.grad_cam_means(x, x, t[rows])[2],
    ):
        whole = stage(a, slice(None))
        assert torch.equal(whole, stage(a, slice(None)))
        assert torch.equal(whole[2:], stage(a[2:], slice(2, None)))
        with_bad = stage(bad, slice(None))
        assert torch.equal(with_bad[[0, 2]], whole[[0, 2]])
        assert with_bad[1].isnan().any()
