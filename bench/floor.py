"""The least time a pass can take: the bytes nobody can avoid, over the copy bandwidth of the same run.

    step   read A for the forward, once more for beta and backward, write dA      3 bytes(A)
    beta, fwd_beta   read A for the forward, once more for beta                   2 bytes(A)
    fwd    read A                                                                 1 bytes(A)
    copy   read A, write A                                                        2 bytes(A)

An image's map can stay in a cache between two passes over it, so `fwd`, whose three stages each look at all
of A, is held against one read.  Parameters and (N, C) or (N, L) tensors are not counted.
"""

from .cases import Case

PASSES_OVER_A = {"fwd": 1, "fwd_beta": 2, "beta": 2, "step": 3, "copy": 2}


def feature_bytes(case: Case) -> int:
    """bytes(A) = N C H W itemsize"""
    return case.n * case.c * case.positions * case.dtype.itemsize


def floor_bytes(case: Case, run: str) -> int:
    """Bytes of `run` that no implementation avoids."""
    return PASSES_OVER_A[run] * feature_bytes(case)


def floor_seconds(case: Case, run: str, copy_bandwidth: float) -> float:
    """`floor_bytes` at `copy_bandwidth` bytes a second, read and written bytes both counted."""
    if not copy_bandwidth > 0:
        raise ValueError(f"copy_bandwidth must be positive; got {copy_bandwidth!r}")
    return floor_bytes(case, run) / copy_bandwidth
