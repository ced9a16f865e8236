"""The autograd nodes: both contractions (values, derivatives of every order, strides, torch.func), and the
linear layer, which has torch's values and gradients whatever torch's TF32 switches are."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ggam_fast import GGAMHead, checks, functional
from ggam_fast.autograd import Linear
from tests.parity import K, N, hard_target, relative_error

EQUATIONS = {"channel_sum": "nchw,nc->nhw", "spatial_sum": "nchw,nhw->nc"}
CONTRACTIONS = {"channel_sum": functional.channel_sum, "spatial_sum": functional.spatial_sum}
both = pytest.mark.parametrize("name", EQUATIONS)


def inputs(name: str, device: torch.device, shape: tuple[int, ...] = (2, 5, 2, 3)) -> tuple[Tensor, Tensor]:
    n, c, h, w = shape
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    size = (n, c) if name == "channel_sum" else (n, h, w)
    return x, torch.randn(size, dtype=torch.float64, device=device, requires_grad=True)


@both
def test_first_and_second_derivatives(name: str, device: torch.device) -> None:
    x, weights = inputs(name, device)
    assert gradcheck(CONTRACTIONS[name], (x, weights))
    assert gradgradcheck(CONTRACTIONS[name], (x, weights))


@both
@pytest.mark.parametrize("channels_last", [True, False])
def test_third_derivative(name: str, channels_last: bool, device: torch.device) -> None:
    """Through a chain of both contractions, so that no order vanishes."""

    def third(chain: Callable[[Tensor], Tensor]) -> Tensor:
        y = chain(x).exp().sum()
        for _ in range(2):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.sin().sum()
        return torch.autograd.grad(y, x)[0]

    x, weights = inputs(name, device, (1, 3, 2, 2))
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    ours, equation = CONTRACTIONS[name], EQUATIONS[name]
    back = "spatial_sum" if name == "channel_sum" else "channel_sum"

    def fused(x: Tensor) -> Tensor:
        return CONTRACTIONS[back](x, ours(x, weights) * 0.1)

    def plain(x: Tensor) -> Tensor:
        return torch.einsum(EQUATIONS[back], x, torch.einsum(equation, x, weights) * 0.1)

    assert relative_error(third(fused), third(plain)) < 1e-10


@both
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="needs triton")
def test_derivatives_on_the_triton_backend(name: str, order: int, device: torch.device) -> None:
    """Of A and of the weights, in float32 against torch's einsum in float64."""
    exact = inputs(name, device, (1, 3, 2, 2))
    given = [x.detach().float().requires_grad_() for x in exact]
    back = "spatial_sum" if name == "channel_sum" else "channel_sum"

    def derivatives(y: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        y = y.exp().sum()
        for _ in range(order - 1):
            y = sum(g.sin().sum() for g in torch.autograd.grad(y, leaves, create_graph=True))  # type: ignore[assignment]
        return list(torch.autograd.grad(y, leaves))

    inner = CONTRACTIONS[name](*given, backend="triton") * 0.1  # type: ignore[operator]
    found = derivatives(CONTRACTIONS[back](given[0], inner, backend="triton"), given)  # type: ignore[operator]
    exact_inner = torch.einsum(EQUATIONS[name], *exact) * 0.1
    expected = derivatives(torch.einsum(EQUATIONS[back], exact[0], exact_inner), exact)
    for value, wanted in zip(found, expected, strict=True):
        assert relative_error(value.double(), wanted) < 2e-5


@both
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_strides(name: str, data: st.DataObject) -> None:
    """Slices, steps, transposed and expanded features; values and both gradients."""
    n, c = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 9))
    h, w = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    step = [data.draw(st.integers(1, 2)) for _ in range(4)]
    order = data.draw(st.permutations(range(4)))
    sizes = [n * step[0], c * step[1], h * step[2], w * step[3]]
    base = torch.randn([sizes[i] for i in order], dtype=torch.float64)
    x = base.permute([order.index(i) for i in range(4)])[:: step[0], :: step[1], :: step[2], :: step[3]]
    if data.draw(st.booleans()):
        x = x[:, :, :1, :1].expand(n, c, h, w)
    weights = torch.randn((n, c) if name == "channel_sum" else (n, h, w), dtype=torch.float64)
    x, weights = x.detach().requires_grad_(), weights.requires_grad_()
    found = CONTRACTIONS[name](x, weights)
    expected = torch.einsum(EQUATIONS[name], x, weights)
    torch.testing.assert_close(found, expected)
    g = torch.randn_like(expected)
    grads = (torch.autograd.grad(y, (x, weights), g) for y in (found, expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x, weights = (t.detach() for t in inputs(name, device, (2, 700, 9, 9)))
    x, weights = x.to(dtype), weights.float()
    found = CONTRACTIONS[name](x, weights)
    assert found.dtype == torch.float32
    assert relative_error(found, torch.einsum(EQUATIONS[name], x.double(), weights.double())) < 1e-5


@both
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_vmap_is_a_loop(name: str, in_dims: tuple[int | None, int | None], device: torch.device) -> None:
    pairs = [inputs(name, device) for _ in range(3)]
    stacked = [
        torch.stack([p[i] for p in pairs]) if dim == 0 else pairs[0][i] for i, dim in enumerate(in_dims)
    ]
    found = torch.func.vmap(CONTRACTIONS[name], in_dims=in_dims)(*stacked)
    for i in range(3):
        arguments = [t[i] if dim == 0 else t for t, dim in zip(stacked, in_dims, strict=True)]
        assert relative_error(found[i], CONTRACTIONS[name](*arguments)) < 1e-12


@both
def test_func_grad_and_per_sample_gradients(name: str, device: torch.device) -> None:
    x, weights = (t.detach() for t in inputs(name, device))

    def fused(x: Tensor, weights: Tensor) -> Tensor:
        return CONTRACTIONS[name](x.unsqueeze(0), weights.unsqueeze(0)).square().sum()

    def plain(x: Tensor, weights: Tensor) -> Tensor:
        return torch.einsum(EQUATIONS[name], x.unsqueeze(0), weights.unsqueeze(0)).square().sum()

    def penalty(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w: sum(g.sin().sum() for g in torch.func.grad(f, (0, 1))(x, w))

    for found, expected in (
        (fused, plain),
        (penalty(fused), penalty(plain)),
        (penalty(penalty(fused)), penalty(penalty(plain))),
    ):
        assert relative_error(found(x[0], weights[0]), expected(x[0], weights[0])) < 1e-12
        each = torch.func.vmap(torch.func.grad(found))(x, weights)
        for i in range(len(x)):
            assert relative_error(each[i], torch.func.grad(expected)(x[i], weights[i])) < 1e-10


@both
def test_forward_mode(name: str, device: torch.device) -> None:
    """By itself, over reverse mode, and mapped over a basis (jacfwd)."""
    x, weights = (t.detach() for t in inputs(name, device))
    ours, equation = CONTRACTIONS[name], EQUATIONS[name]
    tangents = torch.randn_like(x), torch.randn_like(weights)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum(equation, x, w)

    assert gradcheck(
        ours, (x.requires_grad_(), weights.requires_grad_()), check_forward_ad=True, check_backward_ad=False
    )
    x, weights = x.detach(), weights.detach()
    found, expected = (torch.func.jvp(f, (x, weights), tangents) for f in (ours, plain))
    torch.testing.assert_close(found, expected)
    h, e = (torch.func.hessian(lambda x, f=f: f(x, weights).exp().sum())(x) for f in (ours, plain))
    torch.testing.assert_close(h, e)


@both
def test_gradients_under_autocast_stay_float32(name: str, device: torch.device) -> None:
    """autograd.grad called inside autocast, as a gradient penalty does."""
    x, weights = (t.detach().float().requires_grad_() for t in inputs(name, device))
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            y = CONTRACTIONS[name](x, weights).square().sum()
            first = torch.autograd.grad(y, (x, weights), create_graph=True)
            results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, weights))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# The layer

backends = pytest.mark.parametrize(
    "backend",
    ["torch", pytest.param("triton", marks=pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason=""))],
)
GIVEN = [("x", "weight", "bias"), ("x",), ("weight",), ("bias",)]


def layer_inputs(device: torch.device, given: tuple[str, ...] = GIVEN[0]) -> list[Tensor]:
    shapes = {"x": (5, 7), "weight": (3, 7), "bias": (3,)}
    return [torch.randn(shape, device=device).requires_grad_(name in given) for name, shape in shapes.items()]


@backends
@pytest.mark.parametrize("given", GIVEN, ids="-".join)
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_of_a_layer(
    given: tuple[str, ...], has_bias: bool, backend: str, device: torch.device
) -> None:
    x, weight, bias = layer_inputs(device, given)
    found = Linear.apply(x, weight, bias if has_bias else None, backend)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, bias)]
    expected = F.linear(exact[0], exact[1], exact[2] if has_bias else None)
    assert relative_error(found, expected) < 1e-6
    pairs = list(zip((x, weight, bias), exact, strict=True))[: 3 if has_bias else 2]
    asked = [(t, e) for t, e in pairs if t.requires_grad]
    if not asked:
        assert not found.requires_grad
        return
    # of a sum: the gradient that comes in has no strides of its own
    for scale in (1.0, torch.randn_like(found)):
        ours = torch.autograd.grad((found * scale).sum(), [t for t, _ in asked], retain_graph=True)
        theirs = torch.autograd.grad((expected * scale).sum(), [e for _, e in asked], retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) < 1e-6


@backends
def test_second_derivatives_of_a_layer(backend: str, device: torch.device) -> None:
    given = layer_inputs(device)
    exact = [t.detach().double().requires_grad_() for t in given]

    # Of a tenth: the sine of large numbers turns their rounding into its own.
    def ours(*leaves: Tensor) -> Tensor:
        return Linear.apply(*leaves, backend)

    found, expected = (
        torch.autograd.grad((layer(*leaves) / 10).sin().sum(), leaves, create_graph=True)
        for layer, leaves in ((ours, given), (F.linear, exact))
    )
    again = [
        torch.autograd.grad(sum(g.cos().sum() for g in first), leaves)
        for first, leaves in ((found, given), (expected, exact))
    ]
    for a, b in zip((*found, *again[0]), (*expected, *again[1]), strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="needs triton")
@pytest.mark.parametrize("hidden_size", [260, 0])
def test_a_head_has_one_set_of_logits(hidden_size: int, device: torch.device) -> None:
    """With a graph and without one, and of the loss in one piece: the same products, so the same bits."""
    head = GGAMHead(300, K, hidden_size=hidden_size, backend="triton", device=device)
    x, target = torch.randn(N, 300, 3, 5, device=device), hard_target(device)
    with torch.no_grad():
        expected = head(x, target).logits
    assert torch.equal(head(x, target).logits, expected)
    assert torch.equal(functional.fused_ggam_loss(head, x, target).out.logits, expected)


@pytest.mark.gpu
def test_torchs_switches_change_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    head = GGAMHead(512, K, device=device).train()
    x = torch.randn(N, 512, 5, 5, device=device, requires_grad=True)
    target = hard_target(device)

    def step() -> list[Tensor]:
        out = head(x, target)
        loss = F.cross_entropy(out.logits, target) + out.guidance_loss
        return [out.logits, *torch.autograd.grad(loss, [x, *head.parameters()])]

    expected = step()
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    for a, b in zip(step(), expected, strict=True):
        assert torch.equal(a, b)
