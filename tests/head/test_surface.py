"""The inputs and outputs of a head: ranges, pre_logits, reset, devices and types."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from ggam_fast import GGAMHead, GGAMOutput
from ggam_fast.reference import GGAMHeadReference
from tests.head.heads import HEADS, MapClassifier, poolings
from tests.parity import (
    C,
    H,
    K,
    N,
    W,
    features,
    hard_target,
    pair,
    relative_error,
    soft_target,
)


def test_ranges(device: torch.device) -> None:
    head, _ = pair(device=device, hidden_size=10)
    out = head(features(device), soft_target(device))
    assert isinstance(out, GGAMOutput)
    assert (out.channel_attention > 0).all()
    one = torch.ones(N, device=device, dtype=torch.float64)
    torch.testing.assert_close(out.channel_attention.sum(1), one)
    torch.testing.assert_close(out.spatial_attention.sum((1, 2)), one)
    assert out.guidance_loss >= 0
    assert not out.cam_weights.requires_grad


@poolings(hidden_size=10)
def test_eval_logits_are_those_of_the_guided_forward(options: dict[str, Any], device: torch.device) -> None:
    head, _ = pair(device=device, **options)
    x, target = features(device), hard_target(device)
    head.eval()
    assert torch.equal(head(x), head(x, target).logits)


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
def test_no_classes(kind: type[nn.Module], device: torch.device) -> None:
    x = features(device)
    for options, width in (({"hidden_size": 10}, 10), ({"hidden_size": 0}, C), ({"hidden_size": None}, C)):
        head = kind(C, 0, **options).to(device, torch.float64).eval()
        assert head.num_features == width
        assert head(x).shape == (N, width)
        with pytest.raises(ValueError, match="num_classes=0"):
            head(x, hard_target(device))
    attended = kind(C, 0, pool_type="").to(device, torch.float64)
    assert attended(x).shape == x.shape


@pytest.mark.parametrize("name", HEADS)
def test_pre_logits_is_what_the_last_layer_gets(name: str, device: torch.device) -> None:
    options = HEADS[name]
    if options["pool_type"] == "":
        options = {**options, "build_classifier": MapClassifier}
    head, reference = pair(device=device, **options)
    head.eval(), reference.eval()
    x = features(device)
    found = head(x, pre_logits=True)
    assert relative_error(found, reference(x, pre_logits=True)) < 1e-10
    layers = head.classifier
    last = layers[-1] if isinstance(layers, nn.Sequential) else layers
    assert relative_error(last(found), head(x)) < 1e-10
    if "build_classifier" not in options:
        assert found.shape == (N, head.num_features)


def test_a_classifier_set_by_hand_can_be_reset(device: torch.device) -> None:
    head = GGAMHead(C, K, hidden_size=10, device=device)
    head.classifier = nn.Linear(C, K, device=device)
    head.reset(K + 1)
    assert head(features(device, torch.float32)).shape[1] == K + 1


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
def test_reset_keeps_what_fits(kind: type[GGAMHead], device: torch.device) -> None:
    head = kind(C, K, hidden_size=10, feat_size=(H, W)).to(device, torch.float64).eval()
    x = features(device)
    before = head(x, pre_logits=True)
    head.reset(3)
    assert head(x).shape == (N, 3)
    assert torch.equal(head(x, pre_logits=True), before)
    head.reset(0)
    assert torch.equal(head(x), before)
    head.reset(4, "max")
    assert head(x, hard_target(device, k=4)).logits.shape == (N, 4)
    head.reset(5, "flatten")
    assert head(x).shape == (N, 5)
    head.reset(2, "avg", reset_other=True)
    assert isinstance(head.classifier, nn.Linear)
    assert head(x).shape == (N, 2)
    head.reset(0, "")
    assert head(x).shape == x.shape
    assert not any(m.training for m in head.modules())
    assert {p.dtype for p in head.parameters()} == {torch.float64}


def test_reset_replaces_a_custom_classifier(device: torch.device) -> None:
    own = nn.Sequential(nn.Linear(C, 8), nn.ReLU(), nn.Identity(), nn.Identity(), nn.Linear(8, K))
    head = GGAMHead(C, K, classifier=own).to(device, torch.float64)
    assert head.num_features == C
    head.reset(3)
    assert head.num_features == 512
    assert head(features(device)).shape == (N, 3)


@pytest.mark.parametrize("arguments", [(7, "bogus"), (7, ""), (-1,), (7, "flatten")])
def test_reset_that_fails_changes_nothing(arguments: tuple[Any, ...], device: torch.device) -> None:
    head = GGAMHead(C, K, hidden_size=10).to(device, torch.float64).eval()
    x, before = features(device), copy.deepcopy(head.state_dict())
    expected = head(x)
    with pytest.raises(ValueError, match=r"pool_type|num_classes|feat_size"):
        head.reset(*arguments)
    assert torch.equal(head(x), expected)
    assert head.num_classes == K
    assert head.pool_type == "avg"
    assert list(before) == list(head.state_dict())


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
@pytest.mark.parametrize(("given", "width"), [({"rd_channels": 6}, 6), ({"rd_ratio": 1 / 4}, C // 2)])
def test_reset_takes_other_features(
    kind: type[GGAMHead], given: dict[str, Any], width: int, device: torch.device
) -> None:
    """As timm asks for after layers below the head were pruned."""
    head = kind(C, K, hidden_size=10, **given).to(device).eval()
    x = torch.cat([features(device, torch.float32)] * 2, 1)
    head.reset(3, in_features=2 * C, device=device, dtype=torch.float32)
    assert (head.in_features, head.rd_channels, head.fc1.out_features) == (2 * C, width, width)
    assert head(x, hard_target(device, k=3)).cam_weights.shape == (N, 2 * C)
    assert not any(m.training for m in head.modules())
    head.reset(4, reset_other=True, in_features=C, dtype=torch.float64)
    assert {p.dtype for p in head.parameters()} == {torch.float64}
    assert head(features(device)).shape == (N, 4)


def test_reset_to_features_that_do_not_fit_changes_nothing(device: torch.device) -> None:
    head = GGAMHead(C, K, rd_channels=6, hidden_size=10, device=device).eval()
    x = features(device, torch.float32)
    expected, parts = head(x), dict(head.named_modules())
    for wrong, match in ((0, "in_features must be at least 1"), (4, "rd_channels must be between 1 and")):
        with pytest.raises(ValueError, match=match):
            head.reset(3, in_features=wrong)
        assert (head.num_classes, head.in_features, head.rd_channels) == (K, C, 6)
        assert dict(head.named_modules()) == parts
    with pytest.raises(ValueError, match="pool_type"):
        head.reset(3, "bogus", in_features=2 * C)
    with pytest.raises(ValueError, match="needs feat_size"):
        head.reset(3, "flatten", in_features=2 * C)
    assert head.fc1.in_features == C
    assert torch.equal(head(x), expected)


def test_meta_device() -> None:
    head = GGAMHead(C, K, device="meta")
    out = head(torch.empty(2, C, H, W, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"))
    assert out.logits.shape == (2, K)
    assert out.logits.is_meta


def test_built_of_fake_tensors() -> None:
    """As tools do that count parameters without their memory."""
    with FakeTensorMode():
        head = GGAMHead(C, K, hidden_size=8)
        assert head(torch.empty(2, C, 3, 3)).shape == (2, K)


def test_device_and_dtype_of_the_parameters(device: torch.device) -> None:
    head = GGAMHead(C, K, device=device, dtype=torch.float16)
    floats = [t for t in (*head.parameters(), *head.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float16}
    assert {t.device.type for t in floats} == {device.type}
    out = head(features(device).half(), hard_target(device))
    out.logits.sum().backward()
    assert head.fc1.weight.grad is not None
    assert head.fc1.weight.grad.dtype == torch.float16
