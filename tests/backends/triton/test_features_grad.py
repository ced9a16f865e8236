"""dA from its small factors, against float64 formulas on the same (upcast) inputs."""

import zlib

import pytest
import torch

from .cases import ALL, TOLERANCE, check, make, weights  # first: it skips without triton

from ggam_fast.backends.triton import TRITON as S  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@ALL
@pytest.mark.parametrize("pool_type", ["avg", "max", ""])
@pytest.mark.parametrize("spatial", [True, False])
def test_features_grad(
    n: int, c: int, l: int, layout: str, dtype: torch.dtype, pool_type: str, spatial: bool,
    device: torch.device, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    turn = zlib.crc32(request.node.nodeid.encode())  # spreads what may be given over the cases
    a = make(n, c, l, device, dtype, layout)
    s, x = weights(n, c, device), weights(n, c, device)
    dg = weights(n, c, device) if turn % 2 else None
    scale = torch.tensor(-0.3, device=device) if turn // 2 % 2 else None
    t, du = (weights(n, l, device), weights(n, l, device)) if spatial else (None, None)
    index = torch.randint(l, (n, c), device=device)
    first = make(n, c, l, device, torch.float32, "nchw") if pool_type == "" else x
    found = S.features_grad(a, pool_type, first, index, t, du, s, dg, scale)

    term = first.double() if pool_type == "" else x.double().unsqueeze(2).expand(n, c, l)
    if pool_type == "max":
        term = term * torch.nn.functional.one_hot(index, l)
    elif pool_type == "avg":
        term = term / l
    if t is not None and du is not None:
        term = term * t.unsqueeze(1) + s.double().unsqueeze(2) * du.unsqueeze(1)
    elif pool_type == "":
        term = term * s.unsqueeze(2)
    if dg is not None:
        term = term + dg.double().unsqueeze(2) / l
    assert found.dtype == dtype
    check(found, term if scale is None else scale.double() * term, max(torch.finfo(dtype).eps, TOLERANCE))
    if n and c > 1 and l > 1 and layout in ("nchw", "channels_last"):
        assert found.stride() == a.stride()
