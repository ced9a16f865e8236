"""The cross entropy of each image, its gradient, and the gradient of the class score that Grad-CAM explains:

    q' = (1 - smoothing) q + smoothing / K      p = softmax(x)      share_n = 1 / images that count
    loss_n = sum_k q'_k (log sum exp x - x_k)   total = sum_n share_n loss_n + weight guidance
    dce = share_n (p sum_k q'_k - q')           dy = q, or one at the first maximum of x

For class indices q is one at the label; a given row q need not sum to one.  An image with the label
`ignore_index` does not count: its results are zero, whatever its logits are.
"""

import triton
import triton.language as tl

from .arrival import is_last, row_sum


@triton.jit
def _counted(labels_ptr, ignore_index, N, BLOCK: tl.constexpr):
    """The number of labels that are not ignored."""
    counts = tl.zeros((BLOCK,), tl.int32)
    start = 0
    while start < N:
        n = start + tl.arange(0, BLOCK)
        counts += (tl.load(labels_ptr + n, mask=n < N, other=ignore_index) != ignore_index).to(tl.int32)
        start += BLOCK
    return tl.sum(counts, axis=0)


@triton.jit
def _target(target_ptr, label, k, K: tl.constexpr, HARD: tl.constexpr):
    """q at k.  A label is compared with k and never used as an address."""
    return (k == label).to(tl.float32) if HARD else tl.load(target_ptr + k, mask=k < K, other=0.0)


@triton.jit
def _peak(row_ptr, x, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The largest x other than NaN, and 1 if any x is NaN, else 0."""
    peaks = tl.full((BLOCK_K,), -float("inf"), tl.float32)
    nans = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, K, BLOCK_K):
        if K > BLOCK_K:
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(row_ptr + k, mask=k < K, other=-float("inf"))
        peaks = tl.maximum(peaks, tl.where(x != x, -float("inf"), x))
        nans |= (x != x).to(tl.int32)
    return tl.max(peaks, axis=0), tl.max(nans, axis=0)


@triton.jit
def _sums(
    row_ptr, x, target_ptr, label, peak, has_nan,
    K: tl.constexpr, HARD: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums over k of exp(x - peak), q, q (peak - x) and peak - x, and where the first maximum is."""
    exponentials = tl.zeros((BLOCK_K,), tl.float32)
    targets = tl.zeros((BLOCK_K,), tl.float32)
    dots = tl.zeros((BLOCK_K,), tl.float32)
    gaps = tl.zeros((BLOCK_K,), tl.float32)
    firsts = tl.full((BLOCK_K,), K, tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if K > BLOCK_K:
            x = tl.load(row_ptr + k, mask=k < K, other=-float("inf"))
        q = _target(target_ptr, label, k, K, HARD)
        gap = tl.where(k < K, peak - x, 0.0)
        exponentials += tl.where(k < K, tl.exp(-gap), 0.0)
        targets += q
        dots += tl.where(q == 0.0, 0.0, q * gap)  # also where the gap is infinite
        gaps += gap
        is_first = tl.where(has_nan == 1, x != x, x == peak) & (k < K)
        firsts = tl.minimum(firsts, tl.where(is_first, k, K))
    return (
        tl.sum(exponentials, axis=0), tl.sum(targets, axis=0), tl.sum(dots, axis=0), tl.sum(gaps, axis=0),
        tl.min(firsts, axis=0),
    )  # fmt: skip


@triton.jit(do_not_specialize=["ignore_index", "smoothing", "weight", "N"])
def cross_entropy_kernel(
    logits_ptr,  # (N, K) float32, contiguous: x
    target_ptr,  # (N,) int64 if HARD, else (N, K) float32, contiguous: q
    losses_ptr,  # (N,) float32; this and each pointer below is None if not needed
    dce_ptr, dy_ptr,  # (N, K) float32, contiguous
    share_ptr,  # (N,) float32
    counter_ptr,  # () int32 zero: images done; only for the total
    guidance_ptr,  # (), any dtype
    total_ptr,  # () float32; needs losses
    ignore_index, smoothing, weight, N,
    K: tl.constexpr,
    HARD: tl.constexpr,
    IGNORE: tl.constexpr,  # whether there is an ignore_index; only if HARD
    PREDICTED: tl.constexpr,  # dy is one at the first maximum of x; a NaN counts as a maximum
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """This program does all classes of one image, in sweeps if there are more than BLOCK_K."""
    n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + n * K
    x = tl.load(row_ptr + tl.arange(0, BLOCK_K), mask=tl.arange(0, BLOCK_K) < K, other=-float("inf"))
    label, counts, images = 0, N > 0, N
    if HARD:
        label = tl.load(target_ptr + n)
        if IGNORE:
            counts = label != ignore_index
            images = _counted(target_ptr, ignore_index, N, min(BLOCK_K, 1024))
        valid = (label >= 0) & (label < K)
        tl.device_assert(valid | (not counts), "target must be in [0, K)")
        label = tl.where(valid, label, -1).to(tl.int32)
    else:
        target_ptr += n * K
    one = 1.0 / tl.maximum(images, 1)
    share = tl.where(counts, one, 0.0)

    peak, has_nan = _peak(row_ptr, x, K, BLOCK_K)
    exponential, target, dot, gap, first = _sums(
        row_ptr, x, target_ptr, label, peak, has_nan, K, HARD, BLOCK_K
    )
    rest = 1.0 - smoothing
    if share_ptr is not None:
        tl.store(share_ptr + n, share)
    if losses_ptr is not None:
        high = tl.log(exponential)  # log sum exp x, less the peak
        loss = rest * (target * high + dot)
        loss += tl.where(smoothing > 0.0, smoothing * (high + gap / K), 0.0)
        if HARD:
            loss = tl.where(valid, loss, float("nan"))  # a wrong label shows even without asserts
        tl.store(losses_ptr + n, tl.where(counts, loss, 0.0))
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        q = _target(target_ptr, label, k, K, HARD)
        if dce_ptr is not None:
            if K > BLOCK_K:
                x = tl.load(row_ptr + k, mask=k < K, other=-float("inf"))
            p = tl.exp(x - peak) / exponential
            dce = share * (p * (rest * target + smoothing) - (rest * q + smoothing / K))
            tl.store(dce_ptr + n * K + k, tl.where(counts, dce, 0.0), mask=k < K)
        if dy_ptr is not None:
            if PREDICTED:
                q = (k == first).to(tl.float32)
            tl.store(dy_ptr + n * K + k, tl.where(counts, q, 0.0), mask=k < K)

    if counter_ptr is not None and is_last(counter_ptr):
        total = one * row_sum(losses_ptr, None, N, min(BLOCK_K, 1024))
        if guidance_ptr is not None:
            total += weight * tl.load(guidance_ptr).to(tl.float32)
        tl.store(total_ptr, total)


@triton.jit(do_not_specialize=["weight"])
def cross_entropy_grad_kernel(
    grad_ptr,  # (), any dtype: the gradient of the total
    dce_ptr,  # (SIZE,) float32, contiguous
    grad_logits_ptr,  # (SIZE,) float32, contiguous
    grad_guidance_ptr,  # () float32, or None
    weight, SIZE,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """This program scales BLOCK elements of dce.  The first program also scales the guidance's weight."""
    grad = tl.load(grad_ptr).to(tl.float32)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dce = tl.load(dce_ptr + at, mask=at < SIZE, other=0.0)
    tl.store(grad_logits_ptr + at, grad * dce, mask=at < SIZE)
    if grad_guidance_ptr is not None and tl.program_id(0) == 0:
        tl.store(grad_guidance_ptr, grad * weight)
