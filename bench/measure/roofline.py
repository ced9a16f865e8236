"""The least time of a pass: the bytes that every implementation must move, over the copy bandwidth.

    step             read A for the forward, again for beta and backward, write dA        3 bytes(A)
    beta, fwd_beta   read A for the forward, again for beta                               2 bytes(A)
    fwd              read A                                                               1 bytes(A)
    copy             read A, write A                                                      2 bytes(A)

Each of the three stages of `fwd` reads all of A.  They count as one read, because an image's map can stay in
a cache between them.  Parameters and tensors of shape (N, C) or (N, L) are not counted.
"""

PASSES_OVER_A = {"fwd": 1, "fwd_beta": 2, "beta": 2, "step": 3, "copy": 2}


def floor_bytes(feature_bytes: int, run: str) -> int:
    """Bytes that every implementation of the pass `run` moves, for features of that many bytes."""
    return PASSES_OVER_A[run] * feature_bytes


def floor_seconds(feature_bytes: int, run: str, copy_bandwidth: float) -> float:
    """Seconds for `floor_bytes` at `copy_bandwidth` bytes a second, read and written bytes together."""
    if not copy_bandwidth > 0:
        raise ValueError(f"copy_bandwidth must be positive; got {copy_bandwidth!r}")
    return floor_bytes(feature_bytes, run) / copy_bandwidth
