"""The guidance loss and GGAMLoss against formulas written out in float64."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from ggam_fast import GGAMHead, GGAMLoss, GGAMLossParts, GGAMOutput, checks
from ggam_fast.functional import fused_ggam_loss, guidance_loss
from ggam_fast.guidance import kl_guidance, log_cam_norm
from ggam_fast.reference import GGAMHeadReference
from tests.parity import OPTIONS, relative_error

N, C, K = 3, 20, 5


@pytest.fixture
def log_s(device: torch.device) -> Tensor:
    return torch.randn(N, C, dtype=torch.float64, device=device).log_softmax(1)


@pytest.fixture
def beta(device: torch.device) -> Tensor:
    return torch.randn(N, C, dtype=torch.float64, device=device)


def normalised(beta: Tensor, cam_norm: str, temperature: float) -> Tensor:
    if cam_norm.startswith("standardized"):
        beta = (beta - beta.mean(1, keepdim=True)) / beta.std(1, keepdim=True, correction=0)
    if cam_norm.endswith("softmax"):
        e = torch.exp(beta / temperature)
        return e / e.sum(1, keepdim=True)
    return 1 / (1 + torch.exp(-beta / temperature))


@pytest.mark.parametrize("cam_norm", OPTIONS["cam_norm"])
@pytest.mark.parametrize("divergence", OPTIONS["divergence"])
@pytest.mark.parametrize("temperature", [1.0, 0.25, 7.0])
def test_written_out(cam_norm: str, divergence: str, temperature: float, log_s: Tensor, beta: Tensor) -> None:
    s, q = log_s.exp(), normalised(beta, cam_norm, temperature)
    each = (s * torch.log(s / q)).sum(1)
    reverse = (q * torch.log(q / s)).sum(1)
    each = {"forward": each, "reverse": reverse, "symmetric": (each + reverse) / 2}[divergence]
    torch.testing.assert_close(kl_guidance(log_s, beta, cam_norm, temperature, divergence), each)

    options = {"cam_norm": cam_norm, "cam_temperature": temperature, "divergence": divergence}
    for reduction, expected in (("mean", each.mean()), ("sum", each.sum())):
        found = guidance_loss(s, beta, reduction=reduction, **options)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(guidance_loss(s, beta, reduction="none", **options), each)
    default = each.sum() if divergence == "forward" else each.mean()
    torch.testing.assert_close(guidance_loss(s, beta, **options), default)


def test_softmax_is_torchs_kl_divergence(log_s: Tensor, beta: Tensor) -> None:
    s, q = Categorical(logits=log_s), Categorical(logits=beta)
    forward, backward = kl_divergence(s, q), kl_divergence(q, s)
    torch.testing.assert_close(kl_guidance(log_s, beta, "softmax", 1.0, "forward"), forward)
    torch.testing.assert_close(
        kl_guidance(log_s, beta, "softmax", 1.0, "symmetric"), (forward + backward) / 2
    )


@pytest.mark.parametrize("cam_norm", OPTIONS["cam_norm"])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3])
def test_symmetric_is_never_negative(cam_norm: str, scale: float, log_s: Tensor, beta: Tensor) -> None:
    loss = kl_guidance(log_s.float(), (beta * scale).float(), cam_norm, 1.0, "symmetric")
    assert (loss >= 0).all()
    assert loss.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e30])
def test_standardized_does_not_see_the_scale_of_beta(scale: float, dtype: torch.dtype, beta: Tensor) -> None:
    expected = log_cam_norm(beta, "standardized", 1.0)
    found = log_cam_norm((beta * scale).to(dtype), "standardized", 1.0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert relative_error(found, expected) < tolerance


def test_standardized_gradient_of_a_tiny_beta(log_s: Tensor, beta: Tensor) -> None:
    """In float32, where the square of 1e-30 is zero: d/dbeta is 1e30 times that of beta of size 1."""
    grads = []
    for scale, dtype in ((1.0, torch.float64), (1e-30, torch.float32)):
        x = (beta * scale).to(dtype).requires_grad_()
        kl_guidance(log_s.to(dtype), x, "standardized", 1.0, "symmetric").sum().backward()
        grads.append(x.grad.double() * scale)  # type: ignore[union-attr]
    assert relative_error(grads[1], grads[0]) < 1e-4


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.3])
def test_standardized_of_a_constant_beta(value: float, log_s: Tensor) -> None:
    constant = torch.full((N, C), value, dtype=torch.float64, device=log_s.device, requires_grad=True)
    found = log_cam_norm(constant, "standardized", 1.0)
    torch.testing.assert_close(found, torch.full_like(found, math.log(0.5)), rtol=1e-6, atol=0)
    kl_guidance(log_s, constant, "standardized", 1.0, "symmetric").sum().backward()
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


def test_extreme_values_stay_finite(device: torch.device) -> None:
    """Where log(softmax) or log(sigmoid) taken in two steps would be -inf."""
    log_s = torch.tensor([[0.0, -200.0, -3000.0]], device=device).log_softmax(1).requires_grad_()
    beta = torch.tensor([[-900.0, 5.0, 900.0]], device=device, requires_grad=True)
    for cam_norm in OPTIONS["cam_norm"]:
        for divergence in OPTIONS["divergence"]:
            loss = kl_guidance(log_s, beta, cam_norm, 1.0, divergence).sum()
            grads = torch.autograd.grad(loss, (log_s, beta))
            assert loss.isfinite()
            assert all(g.isfinite().all() for g in grads)


def test_zero_attention_is_clamped(beta: Tensor) -> None:
    s = torch.zeros(N, C, dtype=torch.float64, device=beta.device)
    s[:, 0] = 1
    assert guidance_loss(s, beta).isfinite()


def test_fresh_value_of_the_papers_loss(device: torch.device) -> None:
    """sigmoid(beta) of a fresh head is 0.5, so the loss is about C/4 log C whatever the image."""
    for channels, expected in ((2048, 3548), (1280, 2067)):
        s = torch.full((1, channels), 1 / channels, dtype=torch.float64, device=device)
        found = guidance_loss(s, torch.zeros_like(s))
        assert abs(float(found) - expected) / expected < 0.01


# GGAMLoss


def output(device: torch.device, n: int = N) -> GGAMOutput:
    logits = torch.randn(n, K, device=device, dtype=torch.float64, requires_grad=True)
    guidance = torch.rand((), device=device, dtype=torch.float64, requires_grad=True)
    return GGAMOutput(logits, logits, logits, logits, guidance)


@pytest.mark.parametrize("weight", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("soft", [True, False])
def test_ggam_loss(weight: float, smoothing: float, soft: bool, device: torch.device) -> None:
    out = output(device)
    target = torch.tensor([0, 4, 2], device=device)
    given = torch.rand(N, K, device=device).softmax(1) if soft else target
    p = given.double() if soft else F.one_hot(target, K).double()
    p = p * (1 - smoothing) + smoothing / K
    expected = -(p * out.logits.log_softmax(1)).sum(1).mean() + weight * out.guidance_loss
    found = GGAMLoss(weight, label_smoothing=smoothing)(out, given)
    assert found.shape == ()
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, [out.logits, out.guidance_loss]),
        torch.autograd.grad(expected, [out.logits, out.guidance_loss], allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_plain_logits_are_the_cross_entropy(device: torch.device) -> None:
    logits, target = output(device).logits, torch.tensor([1, 0, 3], device=device)
    torch.testing.assert_close(GGAMLoss(2.0)(logits.detach(), target), F.cross_entropy(logits, target))


@pytest.mark.parametrize("soft", [True, False])
def test_empty_batch_is_zero(soft: bool, device: torch.device) -> None:
    logits = torch.zeros(0, K, device=device, requires_grad=True)
    target = torch.zeros(0, K, device=device) if soft else torch.zeros(0, dtype=torch.int64, device=device)
    loss = GGAMLoss(0)(logits, target)
    assert loss == 0
    loss.backward()


def test_nothing_learned_by_the_loss() -> None:
    assert list(GGAMLoss().state_dict()) == []
    assert "guidance_weight=0.5" in repr(GGAMLoss(0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_summed_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    """A batch of 70,000 whose summed cross entropy, 1.4e6, is beyond float16."""
    logits = torch.zeros(70_000, 2, device=device, dtype=dtype)
    logits[:, 0] = 20
    target = torch.ones(len(logits), dtype=torch.int64, device=device)
    loss = GGAMLoss()(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.cpu(), torch.tensor(20.0), rtol=1e-4, atol=0)


@pytest.fixture(params=["torch", "recorded"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The loss in torch's operations, or replayed."""
    if request.param == "recorded":
        if not checks.TRITON_AVAILABLE:
            pytest.skip("needs triton")
        monkeypatch.setenv("GGAM_FAST_BACKEND", "triton")
    return request.param


def leaf(device: torch.device) -> Tensor:
    return torch.randn(N, K, device=device, requires_grad=True)


def told(function: Any, *arguments: Any) -> list[warnings.WarningMessage]:
    """The warnings about a missing guidance."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function(*arguments)
    return [w for w in found if "plain logits" in str(w.message)]


def test_a_loss_without_guidance_says_so_once(path: str, device: torch.device) -> None:
    logits, target = leaf(device), torch.tensor([1, 0, 3], device=device)
    loss = GGAMLoss(0.5)
    (warning,) = told(loss, logits, target)
    assert warning.category is UserWarning
    assert warning.filename == __file__
    assert "GGAMLoss(guidance_weight=0.5)" in str(warning.message)
    assert "loss_fn(model(images, target), target)" in str(warning.message)
    assert not told(loss, logits, target)
    assert told(copy.deepcopy(GGAMLoss(0.5)), logits, target)
    strict = GGAMLoss(0.5, strict=True)
    with pytest.raises(TypeError, match=r"plain logits.*model\(images, target\)"):
        strict(logits, target)


def test_what_has_nothing_to_guide_is_silent(path: str, device: torch.device) -> None:
    logits, target = leaf(device), torch.tensor([1, 0, 3], device=device)
    out = GGAMOutput(*[logits] * 4, torch.rand((), device=device))
    for loss, given in ((GGAMLoss(0, strict=True), logits), (GGAMLoss(strict=True), out)):
        assert not told(loss, given, target)
    assert not told(GGAMLoss(strict=True), logits.detach(), target)
    with torch.no_grad():
        head = GGAMHead(C, K, hidden_size=0, device=device)
        assert not told(GGAMLoss(strict=True), head(torch.rand(N, C, 2, 2, device=device)), target)


def test_a_compiled_loss_without_guidance_says_so(device: torch.device) -> None:
    logits, target = leaf(device), torch.tensor([1, 0, 3], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(GGAMLoss(0.5), backend="eager", fullgraph=True)
    assert len(told(compiled, logits, target)) == 1
    assert not told(compiled, logits, target)
    strict = torch.compile(GGAMLoss(0.5, strict=True), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="plain logits"):
        strict(logits, target)


def test_parts(path: str, device: torch.device) -> None:
    out, target = output(device), torch.tensor([0, 4, 2], device=device)
    parts = GGAMLoss(0.5, return_parts=True)(out, target)
    assert isinstance(parts, GGAMLossParts)
    torch.testing.assert_close(parts.cross_entropy, F.cross_entropy(out.logits, target))
    torch.testing.assert_close(parts.guidance, out.guidance_loss)
    torch.testing.assert_close(parts.loss, parts.cross_entropy + 0.5 * parts.guidance)
    inputs = [out.logits, out.guidance_loss]
    for a, b in zip(
        torch.autograd.grad(parts.loss, inputs),
        torch.autograd.grad(GGAMLoss(0.5)(out, target), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    plain = GGAMLoss(0, return_parts=True)(out.logits, target)
    assert plain.guidance == 0
    torch.testing.assert_close(plain.loss, plain.cross_entropy)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["hard", "soft", "ignored"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_and_reductions_are_torchs(
    smoothing: float, kind: str, weighted: bool, reduction: Any, path: str, device: torch.device
) -> None:
    logits, target = output(device).logits.float(), torch.tensor([0, 4, 2], device=device)
    ignore = None
    if kind == "soft":
        target = torch.rand(N, K, device=device).softmax(1)
    elif kind == "ignored":
        ignore, target[1] = -7, -7
    weight = torch.rand(K, device=device) if weighted else None
    expected = F.cross_entropy(
        logits, target, weight, ignore_index=-100 if ignore is None else ignore,
        reduction=reduction, label_smoothing=smoothing,
    )  # fmt: skip
    loss = GGAMLoss(0, smoothing, ignore, weight=weight, reduction=reduction)
    torch.testing.assert_close(loss(logits, target), expected)
    out = GGAMOutput(*[logits] * 4, torch.tensor(float("inf"), device=device))
    if reduction == "none":  # a guidance that nobody asked for stays out
        torch.testing.assert_close(loss(out, target), expected)
    assert list(loss.state_dict()) == (["weight"] if weighted else [])


def test_weights_that_leave_nothing_are_zero(device: torch.device) -> None:
    weight = torch.tensor([0.0, 1.0], device=device)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    logits = torch.randn(2, 2, device=device, requires_grad=True)
    loss = GGAMLoss(0, weight=weight)(logits, target)
    assert loss == 0
    loss.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_guidance_of_each_image(device: torch.device) -> None:
    """A head with `guidance_reduction="none"` has the losses of the images, whose mean another head gives."""
    features = torch.rand(N, C, 3, 3, device=device)
    target = torch.tensor([0, -1, 2], device=device)
    options: dict[str, Any] = {"hidden_size": 8, "position_guidance": "relu", "ignore_index": -1}
    mean = GGAMHead(C, K, **options, device=device)
    each = GGAMHead(C, K, **options, guidance_reduction="none", device=device)
    exact = GGAMHeadReference(C, K, **options, guidance_reduction="none").double()
    weights = {name: value for name, value in mean.state_dict().items() if name != "_extra_state"}
    each.load_state_dict(weights)
    exact.load_state_dict(weights)
    found = {}
    for name, head, reduction in (("mean", mean, "mean"), ("each", each, "none"), ("of each", each, "mean")):
        x = features.clone().requires_grad_()
        out = head(x, target)
        criterion = GGAMLoss(0.3, 0.1, ignore_index=-1, reduction=reduction, position_weight=2.0)
        loss = criterion(out, target)
        if name == "each":
            assert out.guidance_loss.shape == loss.shape == (N,)
            assert out.position_loss is not None
            assert not out.guidance_loss[1]
            assert not loss[1]
            direct = guidance_loss(out.channel_attention, out.cam_weights, reduction="none")
            torch.testing.assert_close(out.guidance_loss[::2], direct[::2])
            wanted = exact(features.double().cpu(), target.cpu())
            for ours, theirs in (
                (out.guidance_loss, wanted.guidance_loss),
                (out.position_loss, wanted.position_loss),
            ):
                torch.testing.assert_close(ours.double().cpu(), theirs, atol=1e-5, rtol=1e-5)
            loss = loss.sum() / 2  # of two images that count
        found[name] = loss, *torch.autograd.grad(loss, [x, *head.parameters()])
        with torch.no_grad():
            assert head.eval()(x, target).guidance_loss.shape == out.guidance_loss.shape
        head.train()
    for name in ("each", "of each"):
        for ours, theirs in zip(found[name], found["mean"], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    options = {"guidance_weight": 0.3, "label_smoothing": 0.1, "position_weight": 2.0}
    fused, _ = fused_ggam_loss(each, features, target, **options)
    torch.testing.assert_close(fused, found["mean"][0])


def test_the_default_weights_keep_one_order(device: torch.device) -> None:
    """A fresh default head of a ResNet-50: guidance and positions beside the cross entropy, and on fc2."""
    head = GGAMHead(2048, 200, position_guidance="relu", device=device)
    x, target = torch.randn(32, 2048, 7, 7, device=device).relu(), torch.randint(200, (32,), device=device)
    out = head(x, target)
    criterion = GGAMLoss(return_parts=True)
    _, entropy, guidance, positions = criterion(out, target)
    (of_entropy,) = torch.autograd.grad(entropy, head.fc2.weight, retain_graph=True)
    for part in (criterion.guidance_weight * guidance, positions):
        (of_part,) = torch.autograd.grad(part, head.fc2.weight, retain_graph=True)
        assert 0.1 < float(part.detach() / entropy.detach()) < 10
        assert float(of_part.norm() / of_entropy.norm()) <= 3
