"""The softmax and the guidance, against float64 formulas on the same (upcast) inputs."""

import pytest
import torch

from ggam_fast.backends.torch import Backend, CamTerms
from ggam_fast.checks import CAM_NORM, DIVERGENCE
from ggam_fast.closed_form import ChannelMLP, Options, attend

from .cases import TOLERANCE, check, make, weights  # first: it skips without triton

from ggam_fast.kernels import plan  # isort: skip
from ggam_fast.backends.triton import TRITON as S  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize(("c", "l"), [(1, 1), (130, 49), (2048, 196), (1000, 4097), (8192, 1)])
@pytest.mark.parametrize("divergence", DIVERGENCE)
@pytest.mark.parametrize("cam_norm", CAM_NORM)
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
    of_positions = torch.rand(4, device=device)
    found = S.guided_loss(logits, CamTerms(first), ds, *rest, share, given, of_positions, 2.5)
    expected = Backend().guided_loss(
        logits.double(), CamTerms(first.double()), ds.double(), *rest, share.double(), exact,
        of_positions.double(), 2.5,
    )  # fmt: skip
    assert S.guided_loss(logits, CamTerms(first), ds, *rest, share, given).positions is None
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
