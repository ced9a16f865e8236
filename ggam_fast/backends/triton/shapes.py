"""How features lie in memory, and what a launch is given of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ggam_fast._checkout import load_sibling_kernels

load_sibling_kernels()

from ggam_fast.kernels import plan  # noqa: E402  (needs the line above in a bare checkout)

NORM = {"softmax": 0, "sum": 1, "sigmoid": 2, "none": 3}
POOL = {"avg": 0, "max": 1, "flatten": 2, "": 2}
CAM_NORM = {"sigmoid": 0, "softmax": 1, "standardized": 2}
# Multiply-adds round once, whatever Triton's default is: 3.9 warns that it will change.
FP_FUSION = {"enable_fp_fusion": True}


def native(features: Tensor) -> Tensor:
    """Features with one dense inner dimension; strides are read here, as Inductor may change them."""
    return features if 1 in (features.stride(1), features.stride(2)) else features.contiguous()


def layout(features: Tensor) -> str:
    """Which of channels and positions are neighbours in memory."""
    return plan.POSITIONS_FIRST if features.stride(2) == 1 else plan.CHANNELS_FIRST


def tile(features: Tensor, **options: int) -> plan.Tile:
    """The tile of a pass over these features."""
    _, channels, positions = features.shape
    return plan.tile(channels, positions, layout(features), **options)


def geometry(features: Tensor, tile: plan.Tile | plan.Sums) -> dict[str, int]:
    """The compile-time constants of a pass over A: sizes, inner strides, tile."""
    return {
        "C": features.shape[1],
        "L": features.shape[2],
        "STRIDE_C": features.stride(1),
        "STRIDE_L": features.stride(2),
        "BLOCK_C": tile.block_c,
        "BLOCK_L": tile.block_l,
        "num_warps": tile.num_warps,
        **FP_FUSION,
    }


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """All that the operators allocate comes from here."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def small(batch: int, size: int, like: Tensor) -> Tensor:
    """An empty float32 (batch, size)."""
    return empty((batch, size), like)


def per_image(batch: int, like: Tensor) -> Tensor:
    """An empty float32 (batch,)."""
    return empty((batch,), like)


# What a launch does not need is None: Triton compiles it away, and asks the driver about every pointer it is
# given (4 us each on the machine of `bench/results/h100.md`).


def contiguous(x: Tensor | None) -> Tensor | None:
    """The same in dense memory; None stays."""
    return None if x is None else x.contiguous()


def pair(tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """One or two tensors, padded with None."""
    first, second = (*tensors, None, None)[:2]
    return first, second


def like_layout(features: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty (N, C, L) tensor, dense, in the memory order of `features`."""
    batch, channels, positions = features.shape
    if features.stride(2) == 1 or features.stride(1) != 1:
        return empty((batch, channels, positions), features, dtype)
    return empty((batch, positions, channels), features, dtype).transpose(1, 2)
