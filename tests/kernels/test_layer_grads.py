"""The kernel of the layers' gradients also scales vectors."""

import pytest
import torch

from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.kernels import layer_grads, plan

NAN = float("nan")


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, -0.5])
@pytest.mark.parametrize("lengths", [(), (1,), (2048,), (2049, 10), (6, 4097)])
def test_vectors(lengths: tuple[int, ...], scale: float | None, layers: int, device: torch.device) -> None:
    """Are scaled, and the layers have the bits they have alone."""
    n, sizes = 5, [(33, 65), (4, 8), (1, 70), (32, 64)][:layers]
    tensors = [
        (torch.randn(n, j, device=device), torch.randn(n, c, device=device),
         torch.full((j, c), NAN, device=device), torch.full((j,), NAN, device=device)) for j, c in sizes
    ]  # fmt: skip
    given = None if scale is None else torch.tensor(scale, device=device)
    vectors = [torch.randn(v, device=device) for v in lengths]
    out = [torch.full((v + 32,), NAN, device=device) for v in lengths]
    cut = plan.LAYER_GRADS
    tiles = sum(plan.blocks(j, cut.block_m) * plan.blocks(c, cut.block_n) for j, c in sizes)
    flat = [x for size in sizes for x in size] + [0] * (8 - 2 * layers)

    def launch(count: int) -> None:
        pairs = [x for v, o in zip(vectors, out, strict=True) for x in (v, o[16:-16])][: 2 * count]
        programs = tiles + sum(plan.blocks(v, cut.block_m * cut.block_n) for v in lengths[:count])
        layer_grads.layer_grads_kernel[(programs,)](
            *[x for layer in tensors for x in layer], *[None] * (16 - 4 * layers), given, n, *flat,
            *pairs, *[None] * (4 - len(pairs)), *lengths[:count], *[0] * (2 - count),
            BLOCK_J=cut.block_m, BLOCK_C=cut.block_n, BLOCK_N=cut.block_k, STEPS=1, WIDE_J=False,
            WIDE_C=False, STAGES=cut.stages, PRECISION="ieee", num_warps=cut.num_warps,
        )  # fmt: skip

    launch(0)
    alone = [(weight.clone(), bias.clone()) for *_, weight, bias in tensors]
    for *_, weight, bias in tensors:
        weight.fill_(NAN)
        bias.fill_(NAN)
    launch(len(lengths))
    for (*_, weight, bias), before in zip(tensors, alone, strict=True):
        assert torch.equal(weight, before[0])
        assert torch.equal(bias, before[1])
    for vector, found in zip(vectors, out, strict=True):
        assert torch.equal(found[16:-16], vector * (scale or 1.0))
        assert found[:16].isnan().all()
        assert found[-16:].isnan().all()
