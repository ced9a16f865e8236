"""channel_sum and spatial_sum: values, derivatives of every order, strides, torch.func."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ggam_fast import functional
from ggam_fast.stages import Stages, rows_times, rows_times_by_sum
from tests.parity import relative_error

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
def test_forward_mode_is_refused(name: str, device: torch.device) -> None:
    x, weights = (t.detach() for t in inputs(name, device))
    with pytest.raises(RuntimeError, match=r"jvp|forward mode|functorch"):
        torch.func.jvp(CONTRACTIONS[name], (x, weights), (x, weights))


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


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_in_both_layouts(n: int, channels_last: bool, dtype: torch.dtype, device: torch.device) -> None:
    a = torch.randn(n, 5, 7).to(device, dtype)
    a = a.transpose(1, 2).contiguous().transpose(1, 2) if channels_last else a
    found = Stages().spatial_sum(a, None, 1 / 7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), a.double().mean(2), rtol=1e-6, atol=1e-7)


def test_rows_times_in_both_forms(device: torch.device) -> None:
    """As a product, and as the sum that a GPU's compiler gets."""
    rows, matrix = (torch.randn(shape).to(device) for shape in ((3, 2, 5), (3, 5, 7)))
    expected = torch.matmul(rows.double(), matrix.double())
    for form in (rows_times, rows_times_by_sum):
        torch.testing.assert_close(form(rows, matrix).double(), expected, rtol=1e-5, atol=1e-5)
