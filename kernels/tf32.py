"""Products of float32 matrices on tensor cores, which multiply TF32 (10 bits of mantissa): x = high + low and

    x w = high(x) high(w) + low(x) high(w) + high(x) low(w)      (low(x) low(w), below 2^-20 of it, left out)

in three sums that do not wait for each other.  Tensor cores truncate their sums, so the large products of
each block of k are added to the others in float32.  The small products are 2^-10 of the large ones and are
summed on the tensor cores.
"""

import triton
import triton.language as tl


@triton.jit
def parts(x):
    """x truncated to TF32, which keeps infinities and NaN, and the rest, which is below 2^-10 of x."""
    high = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def add_product(x, w, acc, low, low_1, PRECISION: tl.constexpr):
    """(acc, low, low_1) with x w added; `combined` adds them.  PRECISION is "tf32x3" or one of tl.dot's."""
    if PRECISION != "tf32x3":
        return tl.dot(x, w, acc, input_precision=PRECISION), low, low_1
    x_high, x_low = parts(x)
    w_high, w_low = parts(w)
    # The option keeps the compiler from moving the sum into the product.
    acc += tl.dot(x_high, w_high, input_precision="tf32", max_num_imprecise_acc=1)
    low = tl.dot(x_low, w_high, low, input_precision="tf32")
    low_1 = tl.dot(x_high, w_low, low_1, input_precision="tf32")
    return acc, low, low_1


@triton.jit
def combined(acc, low, low_1):
    """The sum of the three.  If it is infinite, the small products are NaN (inf - inf) and are left out."""
    return acc + tl.where(tl.abs(acc) == float("inf"), 0.0, low + low_1)
