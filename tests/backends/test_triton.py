"""Every kernel through its operator, against float64 formulas on the same (upcast) inputs.

On a GPU the compiled kernels run; elsewhere Triton's interpreter runs the same code, program by program.
"""

import copy
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ggam_fast import checks
from ggam_fast.backends.layer import ELU, RELU, Layer
from ggam_fast.backends.torch import Backend, CamTerms, spatial_norm
from ggam_fast.classifier.layers import read
from ggam_fast.closed_form import ChannelMLP, Options, attend
from ggam_fast.norm import SettlingBatchNorm1d

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.kernels import plan

from ggam_fast.backends.triton import TRITON as S
from ggam_fast.backends.triton import pooling
from ggam_fast.backends.triton.register import OPERATORS

LAYOUTS = ("nchw", "channels_last", "sliced_nchw", "sliced_channels_last", "transposed")
SHAPES = [
    pytest.param(2, 5, 1, id="one position"),
    pytest.param(1, 1, 7, id="one channel"),
    pytest.param(3, 130, 49, id="C above a 128 tile; L of 7x7"),
    pytest.param(2, 33, 196, id="L of 14x14, not a multiple of 16"),
    pytest.param(1, 257, 200, id="C one above a partial sum"),
    pytest.param(1, 16, 256, id="exactly one tile"),
    pytest.param(1, 9, 257, id="L one above a tile"),
    pytest.param(1, 3, 1023, id="L one below a power of two"),
    pytest.param(0, 8, 4, id="empty batch"),
]
# More than one tile, part or sweep.
LARGE = [
    pytest.param(2, 1030, 5, id="C above eight parts of 128"),
    pytest.param(1, 5, 1025, id="L one above a row in one tile"),
    pytest.param(2, 3, 2050, id="nine tiles of a row"),
]
TOLERANCE = 2e-6  # relative: float32 accumulation of a few thousand terms
pytestmark = pytest.mark.usefixtures("poisoned_outputs")


def make(n: int, c: int, l: int, device: torch.device, dtype: torch.dtype, layout: str) -> Tensor:
    """Random (N, C, L) features, some of them zero, in one of the memory layouts."""
    x = torch.randn(n + 1, c + 8, l + 8, device=device, dtype=torch.float32)
    x = torch.where(torch.rand_like(x) < 0.3, 0.0, x).to(dtype)
    if layout.startswith("sliced"):
        x = x[1:, 3 : c + 3, 5 : l + 5]  # not aligned, not dense
        return x if layout == "sliced_nchw" else _sliced_channels_last(x)
    x = x[1:, :c, :l].contiguous()
    if layout == "channels_last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "transposed":  # neither inner dimension is dense
        return torch.stack([x, x], -1)[..., 0]
    return x


def _sliced_channels_last(x: Tensor) -> Tensor:
    n, c, l = x.shape
    wide = torch.zeros(n, l, c + 3, device=x.device, dtype=x.dtype)
    wide[:, :, 2 : c + 2] = x.transpose(1, 2)
    return wide[:, :, 2 : c + 2].transpose(1, 2)


def weights(n: int, size: int, device: torch.device) -> Tensor:
    return torch.randn(n, size, device=device)


def check(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """||found - expected|| <= tolerance ||expected||, and every element written."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    error, norm = (found.double() - expected).norm(), expected.norm()
    assert error <= tolerance * norm.clamp_min(1e-30), f"relative error {error / norm:.2e}"


def cases(shapes: list[Any]) -> Iterator[Any]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for i, shape in enumerate(shapes):
        # Both native layouts for every shape; the other three and the types spread over them.
        for j, layout in enumerate(("nchw", "channels_last", LAYOUTS[2 + i % 3])):
            dtype = dtypes[(i + j) % 3]
            yield pytest.param(
                *shape.values, layout, dtype, id=f"{shape.id}-{layout}-{str(dtype).removeprefix('torch.')}"
            )


ALL = pytest.mark.parametrize(("n", "c", "l", "layout", "dtype"), list(cases(SHAPES)))
FUSED = pytest.mark.parametrize(("n", "c", "l", "layout", "dtype"), list(cases(SHAPES + LARGE)))


@ALL
def test_contractions(n: int, c: int, l: int, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    a, t, s = make(n, c, l, device, dtype, layout), weights(n, l, device), weights(n, c, device)
    exact = a.double()
    check(S.spatial_sum(a, t, 0.25), 0.25 * torch.einsum("ncl,nl->nc", exact, t.double()))
    check(S.spatial_sum(a, None, 1.0 / l), exact.mean(2))
    check(S.channel_sum(a, s), torch.einsum("ncl,nc->nl", exact, s.double()))


@ALL
@pytest.mark.parametrize("kappa", [1, 7])
@pytest.mark.parametrize("norm", ["softmax", "sum", "sigmoid"])
def test_spatial_attention_and_its_gradient(
    n: int, c: int, l: int, layout: str, dtype: torch.dtype, norm: str, kappa: int, device: torch.device
) -> None:
    a = make(n, c, l, device, dtype, layout).abs()
    s, v, extra = weights(n, c, device).abs(), weights(n, c, device), weights(n, l, device)
    u = torch.einsum("ncl,nc->nl", a.double(), s.double() / 16).requires_grad_()
    expected, _ = spatial_norm(u, norm)
    t, multiplied, total = S.spatial_attention(a, s / 16, norm, kappa)
    check(t, expected.detach(), 1e-5)
    assert torch.equal(multiplied, t[:0, 0] if kappa == 1 else kappa * t)
    check(total, u.detach().sum(1), 1e-5)

    dt = torch.einsum("ncl,nc->nl", a.double(), v.double())
    for upstream, given in ((dt, None), (dt + extra, extra)):
        (du,) = torch.autograd.grad(expected, u, upstream, retain_graph=True)
        found = S.spatial_attention_grad(a, v, 1.0, given, t, total, norm)
        # dU is a difference of terms of the size of dT * dT/dU.
        scale = (t.double() * upstream).norm() if norm != "sum" else (upstream / total[:, None]).norm()
        assert torch.isfinite(found).all()
        assert (found - du).norm() <= 2e-5 * scale.clamp_min(1e-30)


@ALL
@pytest.mark.parametrize("weighted", [True, False])
def test_max_pool_and_scatter(
    n: int, c: int, l: int, layout: str, dtype: torch.dtype, weighted: bool, device: torch.device
) -> None:
    a, t = make(n, c, l, device, dtype, layout), weights(n, l, device).abs()
    d = a.float() * t.unsqueeze(1) if weighted else a.float()  # the kernel's own product: no new ties
    peak, index = S.max_pool(a, t if weighted else None)
    assert torch.equal(index, d.max(2).indices)
    assert torch.equal(peak, a.float().gather(2, index.unsqueeze(2)).squeeze(2))

    x = weights(n, c, device)
    check(S.position_scatter(x, index, l), x.double().new_zeros(n, l).scatter_add(1, index, x.double()))


def test_max_pool_ties_nans_and_infinities(device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[1, 3, 3, 2], [nan, 1, nan, inf], [-inf] * 4, [0, inf, 2, inf], [-2, -1, nan, 9], [0, 0, 0, 0]]
    a = torch.tensor([rows], device=device)
    for layout in (a, a.transpose(1, 2).contiguous().transpose(1, 2)):
        peak, index = S.max_pool(layout, None)
        assert index.tolist() == [[1, 0, 0, 1, 2, 0]]
        assert torch.equal(
            peak.nan_to_num(7), torch.tensor([[3, 7, -inf, inf, 7, 0]], device=device).nan_to_num(7)
        )


@ALL
def test_attended_map(n: int, c: int, l: int, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    a, t, s = make(n, c, l, device, dtype, layout), weights(n, l, device), weights(n, c, device)
    by_position, by_channel = a.double() * t.double().unsqueeze(1), a.double() * s.double().unsqueeze(2)
    eps = torch.finfo(dtype).eps
    for given, expected in ((t, by_position), (None, by_channel)):
        kept = S.hadamard(a, given, s, False)
        assert kept.dtype == dtype
        check(kept, expected, eps)
        flat = S.hadamard(a, given, s, True)
        assert flat.dtype == torch.float32
        assert flat.is_contiguous()
        check(flat, expected)
        check(pooling.attended_map(a, given, s, 0.3, True), 0.3 * expected)


@ALL
@pytest.mark.parametrize("kappa", [1, 7])
def test_multiply(
    n: int, c: int, l: int, layout: str, dtype: torch.dtype, kappa: int, device: torch.device
) -> None:
    x, y = weights(n, c, device), weights(n, c, device)
    check(S.multiply(x, y, kappa), kappa * x.double() * y.double())


@ALL
def test_grad_cam_means(
    n: int, c: int, l: int, layout: str, dtype: torch.dtype, device: torch.device
) -> None:
    a, t = make(n, c, l, device, dtype, layout), weights(n, l, device)
    dense = make(n, c, l, device, torch.float32, "channels_last")  # another layout and type than A
    expanded = torch.randn(n, c, 1, device=device).expand(n, c, l)  # stride 0, as .mean().backward() gives
    for g in (dense, expanded):
        means, dots, partials = S.grad_cam_means(a, g, t)
        check(means, torch.einsum("ncl,nl->nc", g.double(), t.double()) / l, 5e-6)
        check(dots, (a.double() * g.double()).sum(2), 5e-6)
        check(partials.sum(1), (a.double() * g.double()).sum(1), 5e-6)
        check(S.grad_cam_means(a, g, None)[0], g.double().mean(2), 5e-6)


@ALL
@pytest.mark.parametrize("pool_type", ["avg", "max", ""])
@pytest.mark.parametrize("spatial", [True, False])
def test_features_grad(
    n: int, c: int, l: int, layout: str, dtype: torch.dtype, pool_type: str, spatial: bool,
    device: torch.device, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    turn = zlib.crc32(request.node.nodeid.encode())  # spreads what may be given over the cases
    a = make(n, c, l, device, dtype, layout)
    s, x = weights(n, c, device), weights(n, c, device)
    dg = weights(n, c, device) if turn % 2 else None
    scale = torch.tensor(-0.3, device=device) if turn // 2 % 2 else None
    t, du = (weights(n, l, device), weights(n, l, device)) if spatial else (None, None)
    index = torch.randint(l, (n, c), device=device)
    first = make(n, c, l, device, torch.float32, "nchw") if pool_type == "" else x
    found = S.features_grad(a, pool_type, first, index, t, du, s, dg, scale)

    term = first.double() if pool_type == "" else x.double().unsqueeze(2).expand(n, c, l)
    if pool_type == "max":
        term = term * torch.nn.functional.one_hot(index, l)
    elif pool_type == "avg":
        term = term / l
    if t is not None and du is not None:
        term = term * t.unsqueeze(1) + s.double().unsqueeze(2) * du.unsqueeze(1)
    elif pool_type == "":
        term = term * s.unsqueeze(2)
    if dg is not None:
        term = term + dg.double().unsqueeze(2) / l
    assert found.dtype == dtype
    check(found, term if scale is None else scale.double() * term, max(torch.finfo(dtype).eps, TOLERANCE))
    if n and c > 1 and l > 1 and layout in ("nchw", "channels_last"):
        assert found.stride() == a.stride()


@pytest.mark.parametrize(("c", "l"), [(1, 1), (130, 49), (2048, 196), (1000, 4097), (8192, 1)])
@pytest.mark.parametrize("divergence", ["symmetric", "forward"])
@pytest.mark.parametrize("cam_norm", ["sigmoid", "softmax", "standardized"])
@pytest.mark.parametrize("given", [True, False])
def test_guidance(given: bool, cam_norm: str, divergence: str, c: int, l: int, device: torch.device) -> None:
    """Against the torch stage in float64, which tests/test_losses.py holds to autograd."""
    n = 3
    logits, first, ds = (weights(n, c, device) for _ in range(3))
    terms = CamTerms(first)
    if given:
        terms = CamTerms(first, weights(n, l, device), weights(n, l, device), weights(n, c, device))
    rest = (l, cam_norm, 0.7, divergence, 0.3)
    exact_terms = CamTerms(*(None if x is None else x.double() for x in terms))
    found = S.guidance(logits, terms, ds if given else None, *rest)
    expected = Backend().guidance(logits.double(), exact_terms, ds.double() if given else None, *rest)
    for value, exact, tolerance in zip(found, expected, (1e-5, 1e-6, 1e-5, 1e-5), strict=True):
        assert value.dtype == torch.float32
        check(value, exact, tolerance)


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("c", [130, plan.LARGEST_CHANNELS + 1])
def test_guided_loss(c: int, mean: bool, with_entropy: bool, device: torch.device) -> None:
    """Reduced over the images that count, one of which does not; against the torch stage in float64."""
    if c > plan.LARGEST_CHANNELS and not (mean and with_entropy):
        pytest.skip("torch's stage")
    logits, first, ds = (weights(4, c, device) for _ in range(3))
    share, losses = torch.tensor([0.5, 0.0, 0.25, 0.25], device=device), torch.rand(4, device=device)
    rest = (9, "standardized", 0.7, "forward", 0.3, mean)
    given = losses if with_entropy else None
    exact = given.double() if given is not None else None
    found = S.guided_loss(logits, CamTerms(first), ds, *rest, share, given)
    expected = Backend().guided_loss(
        logits.double(), CamTerms(first.double()), ds.double(), *rest, share.double(), exact
    )
    for name, value, wanted in zip(found._fields, found, expected, strict=True):
        if name != "per_image":  # of one that does not count it is not used
            check(value, wanted, 1e-5)


@pytest.mark.parametrize("c", [1, 130, 2048])
@pytest.mark.parametrize("given", [True, False])
def test_softmax_and_its_gradient(given: bool, c: int, device: torch.device) -> None:
    logits, ds = weights(3, c, device), weights(3, c, device)
    extra = weights(3, c, device) if given else None
    scale = torch.tensor(-0.7, device=device) if given else None
    s = S.softmax(logits)
    check(s, logits.double().softmax(1), 1e-6)
    exact = s.double()
    expected, terms = exact * (ds - (ds * exact).sum(1, keepdim=True)), (exact * ds).norm()
    if extra is not None:
        expected, terms = expected - 0.7 * extra.double(), terms + extra.norm()
    assert (S.softmax_grad(ds, s, extra, scale) - expected).norm() <= TOLERANCE * terms


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cam_class", ["label", "predicted"])
@pytest.mark.parametrize("kind", ["hard", "ignored", "soft"])
@pytest.mark.parametrize("k", [2, 200, 1300])
def test_cross_entropy(k: int, kind: str, cam_class: str, smoothing: float, device: torch.device) -> None:
    logits = weights(5, k, device)
    target = torch.rand(5, k, device=device) if kind == "soft" else torch.arange(5, device=device) % k
    ignore_index = 1 if kind == "ignored" else None
    soft = target.double() if kind == "soft" else target
    found = S.cross_entropy(logits, target, smoothing, cam_class, ignore_index)
    expected = Backend().cross_entropy(logits.double(), soft, smoothing, cam_class, ignore_index)
    for value, wanted in zip(found, expected, strict=True):
        if wanted is not None:
            check(value, wanted, 1e-5)
    score, share = S.class_scores(logits, target, cam_class, ignore_index)
    assert torch.equal(score, found[2])
    if ignore_index is not None:
        assert torch.equal(share, found[1])


@pytest.mark.parametrize("follows", [None, Layer(ELU, alpha=0.6), Layer(RELU)], ids=["none", "elu", "relu"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, SettlingBatchNorm1d])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(
    training: bool, momentum: float | None, kind: type[nn.BatchNorm1d], follows: Layer | None,
    device: torch.device,
) -> None:  # fmt: skip
    """Two steps and their gradients, statistics included, against the torch stage in float64."""
    norm = kind(70, momentum=momentum).to(device).train(training)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.add_(torch.rand_like(tensor))
    exact = copy.deepcopy(norm).double()
    for _ in range(2):
        x, rows = 2 * weights(9, 70, device) + 1, [weights(9, 70, device) for _ in range(2)]
        y, saved = S.batch_norm(x, read(norm), follows)
        wanted, exact_saved = Backend().batch_norm(x.double(), read(exact), follows)
        check(y, wanted, 1e-5)
        found, *parameters = S.batch_norm_grad(rows, x, read(norm), follows, saved)
        doubled = [v.double() for v in rows]
        expected, *of_exact = Backend().batch_norm_grad(
            doubled, x.double(), read(exact), follows, exact_saved
        )
        for value, reference in zip([*found, *parameters], [*expected, *of_exact], strict=True):
            check(value, reference, 1e-5)
        for value, reference in zip(norm.buffers(), exact.buffers(), strict=True):
            check(value.double(), reference.double(), 1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1 / 3, 1e20])
def test_guidance_of_any_size_of_beta(size: float, device: torch.device) -> None:
    logits, beta = weights(2, 70, device), weights(2, 70, device)
    rest = (9, "standardized", 1.0, "symmetric", 1.0)
    of_one = S.guidance(logits, CamTerms(beta), None, *rest)
    found = S.guidance(logits, CamTerms(beta * size), None, *rest)
    for value, expected in zip(found[2:], of_one[2:], strict=True):
        check(value, expected.double(), 1e-5)
    for channels in (70, 1000, 1280):  # whose sum rounds
        flat, zeros = torch.full((2, channels), size, device=device), torch.zeros(2, channels, device=device)
        for backend in (S, Backend()):
            found, half = (backend.guidance(zeros, CamTerms(x), None, *rest)[2] for x in (flat, zeros))
            check(found, half.double(), 1e-5)


def test_more_channels_than_a_program_holds(device: torch.device) -> None:
    c = plan.LARGEST_CHANNELS + 1
    logits, first = weights(1, c, device), weights(1, c, device)
    found = S.guidance(logits, CamTerms(first), None, 1, "softmax", 1.0, "symmetric", 1.0)
    exact = Backend().guidance(
        logits.double(), CamTerms(first.double()), None, 1, "softmax", 1.0, "symmetric", 1.0
    )
    for value, expected in zip(found, exact, strict=True):
        check(value, expected, 1e-5)


def test_sum_of_an_all_zero_map_is_uniform(device: torch.device) -> None:
    a = torch.zeros(2, 6, 9, device=device)
    a[1] = 1.0
    s = torch.full((2, 6), 1 / 6, device=device)
    t, _, total = S.spatial_attention(a, s, "sum")
    assert torch.allclose(t, torch.full_like(t, 1 / 9))
    du = S.spatial_attention_grad(a, s, 1.0, weights(2, 9, device), t, total, "sum")
    assert torch.equal(du[0], torch.zeros(9, device=device))
    assert torch.isfinite(du).all()


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
    pooled, logits, t, mean, hidden, total, peak, index, multiplied, s = attend(S, a, mlp, options)
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


@pytest.mark.parametrize(("channels", "masked"), [(70, slice(0, 32)), (70, slice(5, 64)), (20, slice(0, 20))])
def test_channels_masked_by_an_infinite_bias(channels: int, masked: slice, device: torch.device) -> None:
    """Whole blocks of channels weigh nothing; where all would, the map is NaN, as torch has it."""
    a = make(2, channels, 9, device, torch.float32, "nchw").abs()
    mlp = ChannelMLP(
        *(torch.randn(x, device=device) for x in ((3, channels), (3,), (channels, 3), (channels,)))
    )
    assert mlp.fc2_bias is not None
    mlp.fc2_bias[masked] = -float("inf")
    out = attend(S, a, mlp, Options())
    u = torch.einsum("ncl,nc->nl", a, out.channel_logits.softmax(1))
    assert u.isnan().all() == (masked.stop - masked.start == channels)
    torch.testing.assert_close(out.spatial, u.softmax(1), equal_nan=True)


@FUSED
@pytest.mark.parametrize("rows", [1, 2])
def test_the_backward_of_one_and_of_two_gradients(
    n: int,
    c: int,
    l: int,
    layout: str,
    dtype: torch.dtype,
    rows: int,
    device: torch.device,
    request: pytest.FixtureRequest,
) -> None:
    turn = zlib.crc32(request.node.nodeid.encode())
    norm = NORMS[turn % 3]
    a = make(n, c, l, device, dtype, layout).abs()
    grads, extra = [torch.randn(n, c, device=device) for _ in range(rows)], torch.randn(n, l, device=device)
    u = torch.einsum("ncl,nc->nl", a.double(), weights(n, c, device).double().abs() / 16).requires_grad_()
    t, total = spatial_norm(u, norm)
    for given in (None, extra) if rows == 1 else (None,):
        pairs = S.attention_backward(a, grads, 0.3, given, t.detach().float(), total.detach().float(), norm)
        assert len(pairs) == rows
        for v, (found, ds) in zip(grads, pairs, strict=True):
            dt = 0.3 * torch.einsum("ncl,nc->nl", a.double(), v.double())
            dt = dt if given is None else dt + given
            (du,) = torch.autograd.grad(t, u, dt, retain_graph=True)
            # dU is a difference of terms of the size of dT * dT/dU, and so is what is summed up of it.
            scale = t if norm != "sum" else 1 / total[:, None]
            terms = (scale * dt).detach().abs()
            assert torch.isfinite(found).all()
            assert (found - du).norm() <= 1e-5 * terms.norm()
            bound = torch.einsum("ncl,nl->nc", a.double().abs(), terms)
            assert torch.isfinite(ds).all()
            assert (ds - torch.einsum("ncl,nl->nc", a.double(), du)).norm() <= 1e-5 * bound.norm()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_opcheck(layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas, fakes (strides included) and dispatch of every stage's operator."""
    monkeypatch.undo()  # opcheck compares outputs of repeated calls: no poison
    a = make(2, 12, 10, device, torch.float32, layout)
    g = make(2, 12, 10, device, torch.float32, "nchw")
    s, t, index = weights(2, 12, device), weights(2, 10, device), torch.randint(10, (2, 12), device=device)
    total, partials = torch.rand(2, device=device) + 1, torch.randn(2, 3, 10, device=device)
    calls: dict[str, list[tuple[Any, ...]]] = {
        "spatial_sum": [(a, t, 0.5), (a, None, 0.5)],
        "channel_sum": [(a, s)],
        "spatial_attention": [(a, s, 0, 1), (a, s, 1, 10)],
        "spatial_attention_grad": [(a, s, 0.5, t, t, total, 1), (a, s, 1.0, None, t, total, 0)],
        "spatial_norm_grad": [(partials, 0.5, t, t, total, 2)],
        "max_pooled": [(a, t), (a, None)],
        "position_scatter": [(s, index, 10)],
        "attended_map": [(a, t, s, 1.0, False), (a, None, s, 0.5, True)],
        "grad_cam_means": [(a, g, t), (a, g, None)],
        "attended": [(a, s, 0, 0, False, 10), (a, s, 1, 1, False, 10), (a, s, 0, 2, True, 1)],
        "attention_backward": [(a, s, s + 1, 1.0, None, t, total, 0), (a, s, None, 0.5, t, t, total, 1)],
        "features_grad": [(a, 0, s, index, t, t, s, s, total[0]), (a, 1, s, index, None, None, s, s, None),
                          (a, 2, g, index, t, t, s, None, None)],
        "product": [(s, s + 1, s.t(), None, None, False), (s, None, s.t(), s[:, 0], None, True)],
        "layer_grads": [(s, t, *[None] * 9), (s, t, t, s, t, t, None, None, s, None, total[0])],
        "softmax": [(s,)],
        "softmax_grad": [(s, s, None, None), (s, s, s, total[0])],
        "guidance": [(s, s, t, t, s, s, 10, 0, True, 1.0, 0.1, True, None, None),
                     (s, s, t, t, s, s, 10, 0, True, 1.0, 0.1, True, total, total),
                     (s, s, None, None, None, None, 10, 2, False, 2.0, 1.0, False, total, None)],
        "cross_entropy": [(s, index[:, 0], None, 0.1, 0.0, False, True, 3, True, True, False),
                          (s, s, None, 0.0, 0.0, True, False, 0, False, True, False),
                          (s, s, total[0], 0.0, 1.0, False, False, 0, True, False, True)],
    }  # fmt: skip
    registered = {
        name.removeprefix("ggam_fast::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ggam_fast::")
    }
    whole_steps = {"guided_step", "guided_step_grads"}  # in tests/test_compiled.py
    assert registered == OPERATORS.keys() == set(calls) | whole_steps
    for name, arguments in calls.items():
        for call in arguments:
            torch.library.opcheck(OPERATORS[name], call)


def test_a_map_of_many_positions(device: torch.device) -> None:
    a = torch.randn(1, 1, 4097, device=device)  # one above a block of the normalisation
    t, _, _ = S.spatial_attention(a, torch.ones(1, 1, device=device), "softmax")
    check(t, a.double().softmax(2)[:, 0], 1e-5)
