"""Batch norm with its activation against float64, the backward of both, and updates of running statistics."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.kernels import batch_norm, plan

NAN = float("nan")
ACTS = {"none": 0, "relu": 1, "elu": 2}
SIZES = [(2, 1), (7, 16), (127, 17), (128, 15), (129, 8), (300, 33), (1, 5)]
ALPHA, EPS = 1.3, 1e-5


def guarded(*shape: int, device: torch.device) -> Tensor:
    """NaN, of a buffer whose margins are NaN too: what is written beside it shows in `untouched`."""
    buffer = torch.full((math.prod(shape) + 32,), NAN, device=device)
    return buffer[16:-16].view(shape)


def untouched(x: Tensor) -> bool:
    buffer = x._base
    return bool(buffer[:16].isnan().all() and buffer[-16:].isnan().all())


def geometry(channels: int) -> dict[str, int]:
    cut = plan.batch_norm(channels)
    return {"C": channels, "BLOCK_N": cut.block_n, "BLOCK_C": cut.block_c, "num_warps": cut.num_warps}


def forward(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None] = (None, None),
    running: tuple[Tensor | None, Tensor | None] = (None, None),
    tracked: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    mode: int = 0,
    act: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)"""
    n, c = x.shape
    y, mean, rstd = (guarded(*size, device=x.device) for size in ((n, c), (c,), (c,)))
    counter = torch.zeros((), dtype=torch.int32, device=x.device) if mode else None
    batch_norm.batch_norm_kernel[(plan.blocks(c, plan.batch_norm(c).block_c),)](
        x, *affine, *running, tracked, counter, y, mean, rstd, momentum, EPS, ALPHA, n,
        TRAINING=training, MOMENTUM=mode, ACT=act, **geometry(c),
    )  # fmt: skip
    assert all(map(untouched, (y, mean, rstd)))
    return y, mean, rstd


def backward(
    grads: list[Tensor], x: Tensor, affine: tuple[Tensor | None, Tensor | None], mean: Tensor, rstd: Tensor,
    training: bool, act: int, wanted: tuple[bool, bool] = (True, True),
) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
    """([dx, ...], [dgamma, dbeta])"""
    (n, c), rows = x.shape, len(grads)
    dx = [guarded(n, c, device=x.device) for _ in grads]
    of_affine = [guarded(c, device=x.device) if w else None for w in wanted]
    pair = [None] * (2 - rows)
    batch_norm.batch_norm_grad_kernel[(rows * plan.blocks(c, plan.batch_norm(c).block_c),)](
        *grads, *pair, x, *affine, mean, rstd, *dx, *pair, *of_affine, ALPHA, n,
        R=rows, TRAINING=training, ACT=act, **geometry(c),
    )  # fmt: skip
    assert all(untouched(t) for t in (*dx, *of_affine) if t is not None)
    return dx, of_affine


def exact(
    x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, training: bool, act: str
) -> Tensor:
    y = F.batch_norm(x, mean, var, gamma, beta, training, 0.1, EPS)
    return {"none": lambda t: t, "relu": F.relu, "elu": lambda t: F.elu(t, ALPHA)}[act](y)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found.double() - expected).norm() <= tolerance * expected.norm().clamp(min=1e-30)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("n", "c"), SIZES)
def test_forward_and_back(n: int, c: int, training: bool, act: str, device: torch.device) -> None:
    training = training and n > 1  # torch refuses one row
    x, gamma, beta, mean, var = (
        (torch.randn(size, device=device) + shift)
        for size, shift in (((n, c), 2.0), ((c,), 1.0), ((c,), 0.0), ((c,), 0.5), ((c,), 0.0))
    )
    var = var.abs() + 0.1
    grads = [torch.randn(n, c, device=device) for _ in range(2)]
    leaves = [t.double().requires_grad_() for t in (x, gamma, beta)]
    y = exact(*leaves, mean.double(), var.double(), training, act)
    first = torch.autograd.grad(y, leaves, grads[0].double(), retain_graph=True)
    last = torch.autograd.grad(y, leaves, grads[1].double())

    running = mean.clone(), var.clone()
    found, *saved = forward(x, (gamma, beta), running, training=training, act=ACTS[act])
    close(found, y.detach(), 1e-5)
    if not training:
        assert torch.equal(running[0], mean)
        assert torch.equal(running[1], var)
    for rows in (1, 2):
        given = grads[2 - rows :]
        dx, (dgamma, dbeta) = backward(given, x, (gamma, beta), *saved, training, ACTS[act])
        if rows == 2:
            assert_gradient(dx[0], first[0], n)
        assert_gradient(dx[-1], last[0], n)
        close(dgamma, last[1], 1e-4)
        close(dbeta, last[2], 1e-4)


def assert_gradient(found: Tensor, expected: Tensor, n: int) -> None:
    """With two rows dx is what is left of two equal terms, times rstd."""
    if n > 2:
        close(found, expected, 1e-4)
    else:
        assert (found.double() - expected).abs().max() <= 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_asked_for(training: bool, device: torch.device) -> None:
    x, dy = (torch.randn(37, 21, device=device) for _ in range(2))
    mean, var = torch.randn(21, device=device), torch.rand(21, device=device) + 0.1
    running = (None, None) if training else (mean, var)
    leaf = x.double().requires_grad_()
    expected = F.batch_norm(leaf, *(None if t is None else t.double() for t in running), training=training)
    (grad,) = torch.autograd.grad(expected, leaf, dy.double())
    y, *saved = forward(x, running=running, training=training)
    close(y, expected.detach(), 1e-5)
    for wanted in ((False, False), (True, False), (False, True)):
        (dx,), (dgamma, dbeta) = backward([dy], x, (None, None), *saved, training, 0, wanted)
        close(dx, grad, 1e-4)
        if dbeta is not None:
            close(dbeta, dy.double().sum(0), 1e-4)
        if dgamma is not None:
            close(dgamma, (dy.double() * expected.detach()).sum(0), 1e-4)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_values_are_torchs(momentum: float | None, device: torch.device) -> None:
    """Of several programs, each of which reads the count, one counts."""
    c = 37
    norm = torch.nn.BatchNorm1d(c, eps=EPS, momentum=momentum, device=device)
    running = torch.zeros(c, device=device), torch.ones(c, device=device)
    tracked = torch.zeros((), dtype=torch.int64, device=device)
    for step in range(1, 6):
        x = torch.randn(2 + 3 * step, c, device=device) * step
        expected = norm(x)
        mode = 1 if momentum is None else 0
        y, *_ = forward(x, running=running, tracked=tracked, momentum=momentum or NAN, mode=mode)
        assert tracked == norm.num_batches_tracked == step
        assert tracked.dtype == torch.int64
        torch.testing.assert_close(running[0], norm.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(running[1], norm.running_var, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_settling_is_the_mean_at_first(device: torch.device) -> None:
    running = torch.full((19,), 5.0, device=device), torch.full((19,), 5.0, device=device)
    tracked = torch.zeros((), dtype=torch.int64, device=device)
    mean, var = (t.double() for t in running)
    for step in range(1, 8):
        x = torch.randn(30, 19, device=device)
        forward(x, running=running, tracked=tracked, momentum=0.25, mode=2)
        factor = max(0.25, 1.0 / step)
        mean = (1 - factor) * mean + factor * x.double().mean(0)
        var = (1 - factor) * var + factor * x.double().var(0)
        assert tracked == step
        torch.testing.assert_close(running[0].double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(running[1].double(), var, rtol=1e-5, atol=1e-6)


def test_evaluation_moves_nothing_and_keeps_images_apart(device: torch.device) -> None:
    x, dy = torch.randn(9, 20, device=device), torch.randn(9, 20, device=device)
    running = torch.randn(20, device=device), torch.rand(20, device=device) + 0.1
    before = [t.clone() for t in running]
    tracked = torch.full((), 4, dtype=torch.int64, device=device)
    clean, *saved = forward(x, running=running, tracked=tracked, training=False, act=2)
    clean_dx = backward([dy], x, (None, None), *saved, False, 2)[0][0]
    x[3], x[5], dy[3] = NAN, float("inf"), NAN
    y, *saved = forward(x, running=running, tracked=tracked, training=False, act=2)
    dx = backward([dy], x, (None, None), *saved, False, 2)[0][0]
    others = torch.tensor([0, 1, 2, 4, 6, 7, 8], device=device)
    assert torch.equal(y[others], clean[others])
    assert torch.equal(dx[others], clean_dx[others])
    assert y[3].isnan().all()
    assert dx[3].isnan().all()
    assert tracked == 4
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))


@pytest.mark.parametrize("act", ["relu", "elu"])
def test_activations_at_their_corner(act: str, device: torch.device) -> None:
    """Small values to float32's last bits, where exp(z) - 1 cancels; NaN stays; the slope at 0."""
    z = torch.tensor([0.0, -0.0, 1e-30, -1e-30, -1e-7, -1e-4, -0.01, -0.3, -0.749, -0.751, -1.0, -5.0, -100.0,
                      2.0, float("inf"), -float("inf"), NAN], device=device).unsqueeze(1)  # fmt: skip
    running = torch.zeros(1, device=device), torch.full((1,), 1.0 - EPS, device=device)
    y, mean, rstd = forward(z, running=running, training=False, act=ACTS[act])
    expected = F.relu(z.double()) if act == "relu" else F.elu(z.double(), ALPHA)
    torch.testing.assert_close(y.double(), expected, rtol=3e-7, atol=0.0, equal_nan=True)
    dy = torch.ones_like(z)
    ((dx,), _) = backward([dy], z, (None, None), mean, rstd, False, ACTS[act])
    below = ALPHA * z.double().exp() if act == "elu" else torch.zeros_like(z).double()
    slope = torch.where(z <= 0, below, 1.0)
    torch.testing.assert_close(dx.double(), slope, rtol=1e-6, atol=1e-44)


def test_a_mean_far_from_zero(device: torch.device) -> None:
    """The variance is of what is centred: the mean square less the square of the mean would be noise."""
    x = torch.randn(200, 24, device=device) + 1e4
    y, *_ = forward(x)
    close(y, F.batch_norm(x.double(), None, None, training=True, eps=EPS), 1e-3)
