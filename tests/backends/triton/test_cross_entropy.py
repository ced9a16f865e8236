"""Cross entropy against float64 formulas on the same (upcast) inputs."""

import pytest
import torch

from ggam_fast.backends.torch import Backend

from .cases import check, weights  # first: it skips without triton

from ggam_fast.backends.triton import TRITON as S  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cam_class", ["label", "predicted"])
@pytest.mark.parametrize("kind", ["hard", "ignored", "soft"])
@pytest.mark.parametrize("k", [2, 200, 1300])
def test_cross_entropy(k: int, kind: str, cam_class: str, smoothing: float, device: torch.device) -> None:
    logits = weights(5, k, device)
    target = torch.rand(5, k, device=device) if kind == "soft" else torch.arange(5, device=device) % k
    ignore_index = 1 if kind == "ignored" else None
    soft = target.double() if kind == "soft" else target
    found = S.cross_entropy(logits, target, smoothing, cam_class, ignore_index)
    expected = Backend().cross_entropy(logits.double(), soft, smoothing, cam_class, ignore_index)
    for value, wanted in zip(found, expected, strict=True):
        if wanted is not None:
            check(value, wanted, 1e-5)
    score, share = S.class_scores(logits, target, cam_class, ignore_index)
    assert torch.equal(score, found[2])
    if ignore_index is not None:
        assert torch.equal(share, found[1])
