"""The layers that are read from a classifier, in their present state."""

import copy

import pytest
import torch
from torch import nn

from ggam_fast import GGAMHead
from ggam_fast.base import GGAMHeadBase
from ggam_fast.classifier.layers import known_layers, read
from ggam_fast.layer import BATCH_NORM
from ggam_fast.norm import SettlingBatchNorm1d
from ggam_fast.reference import GGAMHeadReference
from tests.parity import C, K, N, relative_error


def test_what_is_read_of_a_batch_norm() -> None:
    norm = SettlingBatchNorm1d(3, eps=0.1, momentum=0.2)
    layer = read(norm)
    assert layer.kind == BATCH_NORM
    assert (layer.eps, layer.momentum, layer.settling, layer.training) == (0.1, 0.2, True, True)
    assert layer.weight is norm.weight
    assert layer.running_var is norm.running_var
    assert layer.tracked is norm.num_batches_tracked
    assert layer.from_batch
    assert layer.moves
    frozen = read(norm.eval())
    assert not frozen.from_batch
    assert not frozen.moves
    plain = read(nn.BatchNorm1d(3, track_running_stats=False).eval())
    assert plain.from_batch
    assert not plain.moves
    assert not plain.settling


def test_what_is_not_known() -> None:
    class Own(SettlingBatchNorm1d):
        pass

    for other in (nn.GELU(), Own(3), nn.Sequential(nn.Linear(3, 3)), nn.LayerNorm(3)):
        assert known_layers(nn.Sequential(other, nn.Linear(3, 2)), nn.Dropout(0.0)) is None


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
def test_statistics_that_are_not_tracked_do_not_move(kind: type[GGAMHeadBase]) -> None:
    head = kind(C, K, hidden_size=8).train()
    norm = head.classifier[0]
    norm.track_running_stats = False
    x = torch.rand(N, C, 3, 3)
    logits = head(x, torch.arange(N) % K).logits
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    norm.track_running_stats = True
    assert relative_error(logits, head(x, torch.arange(N) % K).logits) < 1e-6
    assert norm.running_mean.any()


def test_an_assigned_classifier_is_not_the_default_one() -> None:
    head = GGAMHead(C, K, hidden_size=8)
    head.classifier = nn.Sequential(nn.Linear(C, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, K))
    assert head.num_features == C
    head.reset(7)
    assert head(torch.rand(N, C, 3, 3)).shape == (N, 7)
    assert head.num_features == 8
    twin = copy.deepcopy(head)
    first = twin.classifier[1]
    twin.reset(5)
    assert twin.classifier[1] is first


def test_layers_of_a_subclass_without_a_forward_are_known() -> None:
    class Sharded(nn.Sequential):
        """As FSDP makes of a module's class."""

    seen = []
    for kind in (nn.Sequential, Sharded):
        head = GGAMHead(C, K, hidden_size=8, drop_rate=0.5)
        head.classifier.__class__ = kind
        head.drop.register_forward_hook(lambda module, given, out: seen.append(given[0].shape))
        head(torch.rand(N, C, 3, 3))
    assert seen[0] == seen[1] == (N, 8)
