"""Batch norm for the few rows of a head with the activation after it, and the backward of both:

    xhat_nc = (x_nc - mean_c) rstd_c        rstd_c = 1 / sqrt(variance_c + eps)
    y = act(gamma_c xhat + beta_c)          act = none, ReLU or ELU
    d = dy act'                             dgamma_c = sum_n d xhat        dbeta_c = sum_n d
    dx = gamma rstd (d - mean_n d - xhat mean_n (d xhat))   in training;   gamma rstd d   otherwise

In training, mean and variance are the batch's, and the variance is taken after centring.  Otherwise they are
the running ones.  As in torch, running values become (1 - f) running + f batch, with the unbiased variance,

    FIXED  f = momentum       CUMULATIVE  f = 1 / t       SETTLING  f = max(momentum, 1 / t)

in step t = 1, 2, ...  x is read two or three times; after the first time it is in a cache.
"""

import triton
import triton.language as tl

from .arrival import is_last

NO_ACT = tl.constexpr(0)
RELU = tl.constexpr(1)
ELU = tl.constexpr(2)

FIXED = tl.constexpr(0)
CUMULATIVE = tl.constexpr(1)
SETTLING = tl.constexpr(2)


@triton.jit
def _expm1(z):
    """exp(z) - 1 for z <= 0.  Near 0 the difference would cancel, so nine terms of the series are used."""
    series = 1.0 + z * (1.0 / 9.0)
    series = 1.0 + z * (1.0 / 8.0) * series
    series = 1.0 + z * (1.0 / 7.0) * series
    series = 1.0 + z * (1.0 / 6.0) * series
    series = 1.0 + z * (1.0 / 5.0) * series
    series = 1.0 + z * (1.0 / 4.0) * series
    series = 1.0 + z * (1.0 / 3.0) * series
    series = 1.0 + z * 0.5 * series
    return tl.where(z > -0.75, z * series, tl.exp(z) - 1.0)


@triton.jit
def _column_sums(
    x_ptr, shift, c, N, C: tl.constexpr, SQUARED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sums over n of x_nc - shift_c, or of its square."""
    acc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    start = 0
    while start < N:
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask=mask, other=0.0)
        x = tl.where(mask, x - shift[None, :], 0.0)
        acc += x * x if SQUARED else x
        start += BLOCK_N
    return tl.sum(acc, axis=0)


@triton.jit
def _move(running_ptr, batch, factor, c, C: tl.constexpr):
    running = tl.load(running_ptr + c, mask=c < C, other=0.0)
    tl.store(running_ptr + c, (1.0 - factor) * running + factor * batch, mask=c < C)


@triton.jit
def _affine(gamma_ptr, beta_ptr, c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    gamma = tl.full((BLOCK_C,), 1.0, tl.float32)
    beta = tl.zeros((BLOCK_C,), tl.float32)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + c, mask=c < C, other=0.0)
    return gamma, beta


@triton.jit(do_not_specialize=["momentum", "eps", "alpha", "N"])
def batch_norm_kernel(
    x_ptr,  # (N, C) float32, contiguous
    gamma_ptr, beta_ptr,  # (C,) float32; None: 1, and 0
    running_mean_ptr, running_var_ptr,  # (C,) float32, updated in training; in training both may be None
    tracked_ptr,  # () int64: t - 1, increased in training; None if FIXED
    counter_ptr,  # () int32 zero: programs that have read tracked; None if FIXED
    y_ptr,  # (N, C) float32, contiguous
    mean_ptr, rstd_ptr,  # (C,) float32, for the backward; or None
    momentum, eps, alpha, N,
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """This program does all rows of BLOCK_C columns."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if TRAINING:
        near = tl.load(x_ptr + c, mask=c < C, other=0.0)  # a shift near the mean, which may be far from 0
        mean = near + _column_sums(x_ptr, near, c, N, C, False, BLOCK_N, BLOCK_C) / N
        squares = _column_sums(x_ptr, mean, c, N, C, True, BLOCK_N, BLOCK_C)
        variance = squares / N
        factor = momentum
        if MOMENTUM != FIXED:
            tracked = tl.load(tracked_ptr)
            factor = 1.0 / (tracked + 1).to(tl.float32)
            if MOMENTUM == SETTLING:
                factor = tl.maximum(factor, momentum)
            if is_last(counter_ptr):
                tl.store(tracked_ptr, tracked + 1)
        elif tracked_ptr is not None and tl.program_id(0) == 0:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
        if running_mean_ptr is not None:
            _move(running_mean_ptr, mean, factor, c, C)
        if running_var_ptr is not None:
            _move(running_var_ptr, squares / tl.maximum(N - 1, 1), factor, c, C)
    else:
        mean = tl.load(running_mean_ptr + c, mask=c < C, other=0.0)
        variance = tl.load(running_var_ptr + c, mask=c < C, other=0.0)
    rstd = 1.0 / tl.sqrt(variance + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + c, mean, mask=c < C)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + c, rstd, mask=c < C)

    gamma, beta = _affine(gamma_ptr, beta_ptr, c, C, BLOCK_C)
    start = 0
    while start < N:
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask=mask, other=0.0)
        y = (x - mean[None, :]) * rstd[None, :] * gamma[None, :] + beta[None, :]
        if ACT == RELU:
            y = tl.where(y < 0.0, 0.0, y)  # NaN stays
        if ACT == ELU:
            y = tl.where(y > 0.0, y, alpha * _expm1(y))
        tl.store(y_ptr + n[:, None] * C + c[None, :], y, mask=mask)
        start += BLOCK_N


@triton.jit
def _before_act(
    dy_ptr, x_ptr, mean, rstd, gamma, beta, alpha, n, c, N, C: tl.constexpr, ACT: tl.constexpr
):  # fmt: skip
    """(d, xhat) for rows n; d is 0 for rows outside the batch."""
    mask = (n < N)[:, None] & (c < C)[None, :]
    d = tl.load(dy_ptr + n[:, None] * C + c[None, :], mask=mask, other=0.0)
    x = tl.load(x_ptr + n[:, None] * C + c[None, :], mask=mask, other=0.0)
    xhat = (x - mean[None, :]) * rstd[None, :]
    z = xhat * gamma[None, :] + beta[None, :]
    if ACT == RELU:
        d = tl.where(z <= 0.0, 0.0, d)
    if ACT == ELU:
        d = tl.where(z <= 0.0, d * alpha * tl.exp(z), d)
    return d, xhat


@triton.jit(do_not_specialize=["alpha", "N"])
def batch_norm_grad_kernel(
    dy_ptr, dy_1_ptr,  # (N, C) float32, contiguous; names ending in _1 are None for R = 1
    x_ptr,  # (N, C) float32, contiguous
    gamma_ptr, beta_ptr,  # (C,) float32; None: 1, and 0
    mean_ptr, rstd_ptr,  # (C,) float32
    dx_ptr, dx_1_ptr,  # (N, C) float32, contiguous
    dgamma_ptr, dbeta_ptr,  # (C,) float32, for the last dy; or None
    alpha, N,
    C: tl.constexpr,
    R: tl.constexpr,
    TRAINING: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """This program does all rows of BLOCK_C columns of one dy."""
    r = tl.program_id(0) % R
    if R > 1:
        second = r == 1
        if second:
            dy_ptr, dx_ptr = dy_1_ptr, dx_1_ptr
    c = tl.program_id(0) // R * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + c, mask=c < C, other=0.0)
    gamma, beta = _affine(gamma_ptr, beta_ptr, c, C, BLOCK_C)

    sums = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dots = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    start = 0
    while start < N:
        n = start + tl.arange(0, BLOCK_N)
        d, xhat = _before_act(dy_ptr, x_ptr, mean, rstd, gamma, beta, alpha, n, c, N, C, ACT)
        sums += d
        dots += d * xhat
        start += BLOCK_N
    sum_d, dot = tl.sum(sums, axis=0), tl.sum(dots, axis=0)
    if r == R - 1:
        if dgamma_ptr is not None:
            tl.store(dgamma_ptr + c, dot, mask=c < C)
        if dbeta_ptr is not None:
            tl.store(dbeta_ptr + c, sum_d, mask=c < C)

    start = 0
    while start < N:
        n = start + tl.arange(0, BLOCK_N)
        d, xhat = _before_act(dy_ptr, x_ptr, mean, rstd, gamma, beta, alpha, n, c, N, C, ACT)
        if TRAINING:
            d -= (sum_d / N)[None, :] + xhat * (dot / N)[None, :]
        mask = (n < N)[:, None] & (c < C)[None, :]
        tl.store(dx_ptr + n[:, None] * C + c[None, :], d * (gamma * rstd)[None, :], mask=mask)
        start += BLOCK_N
