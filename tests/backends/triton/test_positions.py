"""The target of T and its pull on dU, against float64, with every output poisoned."""

import pytest
import torch
from torch import Tensor

from ggam_fast.backends.torch import Backend, PositionPull, PositionTerms, position_grad

from .cases import check, make, weights  # first: it skips without triton

from ggam_fast.backends.triton import TRITON as S  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")
NORMS = ("relu", "standardized_softmax")
EXACT = Backend()


def terms(norm: str, u: Tensor, share: Tensor | None = None, temperature: float = 0.7) -> PositionTerms:
    return PositionTerms(norm, temperature, u.log_softmax(1), share)


def doubled(given: PositionTerms) -> PositionTerms:
    share = None if given.share is None else given.share.double()
    return given._replace(log_spatial=given.log_spatial.double(), share=share)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("n", "parts", "l"), [(3, 1, 1), (2, 3, 49), (1, 40, 200), (2, 2, 4099), (0, 1, 4)])
def test_targets(norm: str, n: int, parts: int, l: int, device: torch.device) -> None:
    """In one block and in several sweeps; a tiny map, one without a positive value, one that is flat."""
    dt, u = torch.randn(n, parts, l, device=device), 3 * weights(n, l, device)
    for x in (dt, 1e-12 * dt, 1e4 + dt, -dt.abs(), torch.full_like(dt, 1 / 3)):
        found = S.position_guidance(x, terms(norm, u))
        expected = EXACT.position_guidance(x.double(), doubled(terms(norm, u)))
        # z-scores of 1e4 + dT have lost as many bits as 1e4 is larger than dT.
        tolerance = 1e-2 if norm != "relu" and x is not dt and n and float(x.max()) > 1e3 else 1e-4
        check(found.target, expected.target, tolerance)
        check(found.losses, expected.losses, tolerance)
    uniform = S.position_guidance(-dt.abs(), terms("relu", u)).target
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / l))


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_without_a_number_is_alone(norm: str, device: torch.device) -> None:
    """A NaN stays in its image, and is nothing in one that does not count."""
    dt, u = torch.randn(3, 2, 9, device=device), weights(3, 9, device)
    share = torch.tensor([0.5, 0.0, 0.5], device=device)
    whole = S.position_guidance(dt, terms(norm, u, share))
    for ignored, image in ((True, 1), (False, 0)):
        for value in (float("nan"), float("inf")):
            wrong = dt.clone()
            wrong[image, 0, 3] = value
            found = S.position_guidance(wrong, terms(norm, u, share))
            others = [i for i in range(3) if i != image]
            assert torch.equal(found.target[others], whole.target[others])
            assert torch.equal(found.losses[others], whole.losses[others])
            if value != value:  # an infinite map counts as flat
                assert found.target[image].isnan().any()
                assert ignored or found.losses[image].isnan()
            assert not ignored or float(found.losses[image]) == 0
            t, pull = u.softmax(1), PositionPull(found.target, share, 0.3)
            du = S.spatial_norm_grad(0 * u, 1.0, None, t, t.sum(1), "softmax", pull)
            assert torch.isfinite(du[image]).all() == (ignored or torch.isfinite(found.target[image]).all())
            assert torch.isfinite(du[others]).all()


@pytest.mark.parametrize("share", [None, torch.tensor([0.25, 0.0, -0.75])])
@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize("l", [5, 4099])
def test_pulls(l: int, scale: float | None, share: Tensor | None, device: torch.device) -> None:
    t, q = (weights(3, l, device).softmax(1) for _ in range(2))
    factor = None if scale is None else torch.tensor(scale, device=device)
    pull = PositionPull(q, None if share is None else share.to(device), 0.3, factor)
    dt = torch.randn(3, 2, l, device=device)
    rest = (1.0, None, t, t.sum(1), "softmax")
    added = S.spatial_norm_grad(dt, *rest, pull) - S.spatial_norm_grad(dt, *rest)
    check(added, position_grad(t.double(), pull), 1e-3)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_backward_with_a_target(rows: int, norm: str, layout: str, device: torch.device) -> None:
    """Of one gradient: a target beside the same dU. Of two: it pulls the second."""
    n, c, l = 3, 130, 49
    a, u = make(n, c, l, device, torch.float32, layout), weights(n, l, device)
    grads, share = [weights(n, c, device) for _ in range(rows)], torch.tensor([0.5, 0.0, 0.5], device=device)
    t, given = u.softmax(1), terms(norm, u, share)
    common = (0.3, t, t.sum(1), "softmax")
    pairs, found = S.guided_attention_backward(a, grads, *common, given, 2.0)
    exact, target = EXACT.guided_attention_backward(
        a.double(), [v.double() for v in grads], 0.3, t.double(), t.double().sum(1), "softmax",
        doubled(given), 2.0,
    )  # fmt: skip
    check(found.target, target.target, 1e-5)
    check(found.losses, target.losses, 1e-5)
    for (du, ds), (exact_du, exact_ds) in zip(pairs, exact, strict=True):
        check(du, exact_du, 1e-5)
        check(ds, exact_ds, 1e-5)
    plain = S.attention_backward(a, grads, 0.3, None, t, t.sum(1), "softmax")
    assert torch.equal(pairs[0][0], plain[0][0])
    if rows == 1:
        du, alone = S.guided_spatial_attention_grad(a, grads[0], *common, given)
        assert torch.equal(du, pairs[0][0])
        assert torch.equal(alone.target, found.target)
        assert torch.equal(alone.losses, found.losses)
