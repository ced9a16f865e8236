"""FLOPs of the operators, as `torch.utils.flop_counter.FlopCounterMode` adds them up.

    a contraction of A (N, C, L)           2 N C L for each vector that meets A
    a product (M, K) by (K, N)             2 M K N
    dA, an outer product of three factors  6 N C L, where the torch backend writes it as one product

They are the counts of the torch backend's own operations for the same stage.  torch counts nothing for
elementwise work and reductions, so the other operators have no formula.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import features_grad, layer_grads, layers, sums
from .launch import POOL

Shape = Sequence[int]


def _formula(*stages: Callable[..., Any]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """The FLOPs of these stages' operators, from shapes where they are given tensors."""
    formula: Callable[[Callable[..., int]], Callable[..., int]] = register_flop_formula(
        [getattr(torch.ops.ggam_fast, stage.__name__) for stage in stages]
    )
    return formula


@_formula(
    sums.channel_sum,
    sums.spatial_attention,
    sums.spatial_attention_grad,
    sums.guided_spatial_attention_grad,
)
def _contraction(features: Shape, *rest: Any, **more: Any) -> int:
    return 2 * prod(features)


@_formula(sums.spatial_sum)
def _spatial_sum(features: Shape, weights: Shape | None, *rest: Any, **more: Any) -> int:
    return 0 if weights is None else 2 * prod(features)


@_formula(sums.attended)
def _attended(features: Shape, s: Shape, norm: int, pool: int, *rest: Any, **more: Any) -> int:
    return (4 if pool == POOL["avg"] else 2) * prod(features)


@_formula(sums.attention_backward, sums.guided_attention_backward)
def _attention_backward(features: Shape, v: Shape, v_1: Shape | None, *rest: Any, **more: Any) -> int:
    return (4 if v_1 is None else 8) * prod(features)


@_formula(features_grad.features_grad)
def _features_grad(
    features: Shape, pool: int, first: Shape, index: Shape, t: Shape | None, du: Shape | None,
    *rest: Any, **more: Any,
) -> int:  # fmt: skip
    return 6 * prod(features) if pool == POOL["avg"] and t is not None and du is not None else 0


@_formula(layers.product)
def _product(x: Shape, x_1: Shape | None, matrix: Shape, *rest: Any, **more: Any) -> int:
    return (2 if x_1 is None else 4) * x[0] * prod(matrix)


@_formula(layer_grads.layer_grads)
def _layer_grads(*given: Any, **more: Any) -> int:
    pairs = zip(given[0:8:2], given[1:8:2], strict=True)
    return sum(2 * prod(dy) * x[1] for dy, x in pairs if dy is not None and x is not None)
