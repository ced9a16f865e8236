"""The gradients of the linear layers' weights and biases, for several layers at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ggam_fast.backends.registry import full_precision
from ggam_fast.backends.torch import TORCH, scaled

from .launch import FP_FUSION, contiguous, empty, launch, plan, small, thread
from .register import KernelBackend, operator

from ggam_fast.kernels import layer_grads as layer_grads_kernels  # isort: skip


class LayerGrads(KernelBackend):
    """The stages of this file for float32; torch's for other types."""

    def layer_grads(
        self, factors: Sequence[tuple[Tensor, Tensor]], scale: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        if not factors or not _float32(factors):
            return super().layer_grads(factors, scale)
        return self.parameter_grads(factors, [], scale)[0]

    def parameter_grads(
        self, factors: Sequence[tuple[Tensor, Tensor]], vectors: Sequence[Tensor], scale: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        joined = [] if scale is None else _joined(vectors)
        if not factors or not _float32(factors):
            return super().parameter_grads(factors, vectors, scale)
        if joined is None:
            assert scale is not None
            return self.parameter_grads(factors, [], scale)[0], scaled(vectors, scale)
        found: list[Tensor] = []
        copied: list[Tensor] = []
        for i in range(0, len(factors), 4):
            flat = [x for pair in factors[i : i + 4] for x in pair]
            with_it = joined if i == 0 else []
            made = self.run.layer_grads(
                *flat, *[None] * (8 - len(flat)), *with_it, *[None] * (2 - len(with_it)), scale
            )
            found += made[: len(flat)]
            copied += made[8 : 8 + len(with_it)]
        pairs = list(zip(found[::2], found[1::2], strict=True))
        return pairs, list(vectors) if scale is None else [x for v in copied for x in v.unbind(0)]


def _float32(factors: Sequence[tuple[Tensor, Tensor]]) -> bool:
    return all(x.dtype == torch.float32 for pair in factors for x in pair)


def _joined(vectors: Sequence[Tensor]) -> list[Tensor] | None:
    """Up to four vectors joined in pairs (2, C), or None if the vectors of a pair are not side by side."""
    if torch.compiler.is_compiling():  # a compiler cannot see storages
        return None if vectors else []
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    for x, y in pairs:
        same = x.untyped_storage()._cdata == y.untyped_storage()._cdata
        if not same or y.storage_offset() - x.storage_offset() != x.numel() or x.shape != y.shape:
            return None
    found = [x.as_strided((2, x.numel()), (x.numel(), 1)) for x, _ in pairs]
    return found if len(found) <= 2 else None


@operator
def layer_grads(
    dy: Tensor,
    x: Tensor,
    dy_1: Tensor | None,
    x_1: Tensor | None,
    dy_2: Tensor | None,
    x_2: Tensor | None,
    dy_3: Tensor | None,
    x_3: Tensor | None,
    vector: Tensor | None,
    vector_1: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scale dy^T x and scale times the sum of dy over the batch for up to four layers.

    Also scale times one or two vectors.  Results for absent layers and vectors are empty.
    """
    given = [(dy, x), (dy_1, x_1), (dy_2, x_2), (dy_3, x_3)]
    batch = dy.shape[0]
    dot = plan.dot_options(dy.device.type, torch.version.hip is not None)
    out: list[Tensor] = []
    for left, right in given:
        j, c = (0, 0) if left is None or right is None else (left.shape[1], right.shape[1])
        if left is not None and right is not None and not left.shape[0] == right.shape[0] == batch:
            shapes = [tuple(t.shape) for t in (left, right, dy)]
            raise RuntimeError(f"the layers' gradients and inputs must have one batch size; got {shapes}")
        out += [small(j, c, dy), empty((j,), dy)]
    vectors = [vector, vector_1]
    for v in vectors:
        out.append(empty((0,) if v is None else v.shape, dy))
    if thread.faked:
        return tuple(out)  # type: ignore[return-value]
    cut, tiles, scale = plan.LAYER_GRADS, 0, contiguous(scale)
    pointers: list[Tensor | None] = []
    sizes: list[int] = []
    wide_j = wide_c = True  # whether rows of the gradients begin at multiples of 16 bytes
    for i, (left, right) in enumerate(given):
        if left is None or right is None:
            continue
        weight, bias = out[2 * i : 2 * i + 2]
        j, c = weight.shape
        # A layer without inputs has no tiles, but it has a bias gradient.
        if (j * c * batch > plan.LARGEST_PRODUCT and thread.recorder is None) or c == 0:
            with full_precision(right):
                ((found, sums),) = TORCH.layer_grads([(left, right)], scale)
            weight.copy_(found)
            bias.copy_(sums)
            continue
        tiles += plan.blocks(j, cut.block_m) * plan.blocks(c, cut.block_n)
        pointers += [left.contiguous(), right.contiguous(), weight, bias]
        sizes += [j, c]
        wide_j, wide_c = wide_j and j % 4 == 0, wide_c and c % 4 == 0
    more: list[Tensor | None] = []
    lengths: list[int] = []
    programs = tiles
    for v, copied in zip(vectors, out[8:], strict=True):
        more += [None, None] if v is None else [v.contiguous(), copied]
        lengths.append(0 if v is None else v.numel())
        programs += plan.blocks(lengths[-1], cut.block_m * cut.block_n)
        if v is not None and not tiles:
            copied.copy_(v if scale is None else v * scale)
    if tiles:
        pointers += [None] * (16 - len(pointers))
        sizes += [0] * (8 - len(sizes))
        launch(
            layer_grads_kernels.layer_grads_kernel, programs, *pointers, scale, batch, *sizes, *more,
            *lengths, STEPS=plan.power_of_2(plan.blocks(batch, cut.block_k)), WIDE_J=wide_j, WIDE_C=wide_c,
            BLOCK_J=cut.block_m, BLOCK_C=cut.block_n, BLOCK_N=cut.block_k, STAGES=cut.stages,
            num_warps=cut.num_warps, **dot, **FP_FUSION,
        )  # fmt: skip
    return tuple(out)  # type: ignore[return-value]
