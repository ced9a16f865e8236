"""Batch norm and cross entropy, against float64 formulas on the same (upcast) inputs."""

import copy

import pytest
import torch
from torch import nn

from ggam_fast.backends.torch import Backend
from ggam_fast.classifier.layers import read
from ggam_fast.layer import ELU, RELU, Layer
from ggam_fast.norm import SettlingBatchNorm1d

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


@pytest.mark.parametrize("follows", [None, Layer(ELU, alpha=0.6), Layer(RELU)], ids=["none", "elu", "relu"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, SettlingBatchNorm1d])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(
    training: bool, momentum: float | None, kind: type[nn.BatchNorm1d], follows: Layer | None,
    device: torch.device,
) -> None:  # fmt: skip
    """Two steps and their gradients, statistics included, against the torch stage in float64."""
    norm = kind(70, momentum=momentum).to(device).train(training)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.add_(torch.rand_like(tensor))
    exact = copy.deepcopy(norm).double()
    for _ in range(2):
        x, rows = 2 * weights(9, 70, device) + 1, [weights(9, 70, device) for _ in range(2)]
        y, saved = S.batch_norm(x, read(norm), follows)
        wanted, exact_saved = Backend().batch_norm(x.double(), read(exact), follows)
        check(y, wanted, 1e-5)
        found, *parameters = S.batch_norm_grad(rows, x, read(norm), follows, saved)
        doubled = [v.double() for v in rows]
        expected, *of_exact = Backend().batch_norm_grad(
            doubled, x.double(), read(exact), follows, exact_saved
        )
        for value, reference in zip([*found, *parameters], [*expected, *of_exact], strict=True):
            check(value, reference, 1e-5)
        for value, reference in zip(norm.buffers(), exact.buffers(), strict=True):
            check(value.double(), reference.double(), 1e-5)
