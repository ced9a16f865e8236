"""The scale of the attended map: a plain head's scale by default, the printed scale on request.

D = kappa A T.  kappa = L if T sums to one, C if S alone weights A, and 1 for a sigmoid and for "printed".
BN(z / kappa, eps) = BN(z, eps kappa^2), with means times kappa and variances times kappa^2.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ggam_fast import GGAMHead, presets
from ggam_fast.base import GGAMHeadBase
from ggam_fast.functional import fused_ggam_loss
from ggam_fast.reference import GGAMHeadReference
from tests.parity import (
    OPTIONS,
    C,
    H,
    K,
    W,
    assert_parity,
    combine,
    features,
    gradients,
    hard_target,
    pair,
    relative_error,
)

KINDS = pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
# What weights A, and the scale that it has.
WEIGHTS = [
    pytest.param({"attention": "channel_spatial"}, H * W, id="channel_spatial"),
    pytest.param({"attention": "channel_spatial", "spatial_norm": "sum"}, H * W, id="sum"),
    pytest.param({"attention": "channel_spatial", "spatial_norm": "sigmoid"}, 1, id="sigmoid"),
    pytest.param({"attention": "spatial"}, H * W, id="spatial"),
    pytest.param({"attention": "channel"}, C, id="channel"),
    pytest.param({"attention": "channel", "spatial_norm": "sigmoid"}, C, id="channel, norm unused"),
    pytest.param({"attention": "none"}, 1, id="none"),
]
POOLS = {
    "avg": {"pool_type": "avg"},
    "max": {"pool_type": "max"},
    "flatten": {"pool_type": "flatten", "feat_size": (H, W)},
    "map": {"pool_type": ""},
}


def migrated(printed: GGAMHeadBase, kappa: int, **options: Any) -> GGAMHeadBase:
    """The head at a plain head's scale that does what the printed one does: its first norm's eps is given."""
    head = type(printed)(C, K, rd_channels=6, hidden_size=10, **options).to(next(printed.parameters()))
    state = printed.state_dict()
    del state["_extra_state"]  # norm_eps differs
    state["unit_mean"] = torch.ones_like(state["unit_mean"])
    state["classifier.0.running_mean"] = state["classifier.0.running_mean"] * kappa
    state["classifier.0.running_var"] = state["classifier.0.running_var"] * kappa**2
    head.load_state_dict(state)
    return head


@KINDS
@pytest.mark.parametrize(("options", "kappa"), WEIGHTS)
@pytest.mark.parametrize("pool_type", ["avg", "max", "flatten"])
@pytest.mark.parametrize("training", [True, False])
def test_a_printed_head_is_a_plain_one_with_a_larger_eps(
    training: bool, pool_type: str, options: dict[str, Any], kappa: int, kind: type[GGAMHeadBase],
    device: torch.device,
) -> None:  # fmt: skip
    """Of which scores, beta and every gradient are the same, and statistics that move on alike."""
    options, eps = {**options, **POOLS[pool_type]}, 0.03 / kappa**2
    both = pair(device=device, hidden_size=10, attention_scale="printed", norm_eps=eps, **options)
    printed = both[kind is GGAMHeadReference]
    for _ in range(2):  # away from 0 and 1
        printed.train()(features(device))
    head = migrated(printed, kappa, norm_eps=eps * kappa**2, **options)
    assert head.attention_scale == "unit_mean"
    x, target = features(device), hard_target(device)
    found = []
    for module in (head, printed):
        leaf = x.clone().requires_grad_()
        out = module.train(training)(leaf, target)
        found.append({**out._asdict(), **gradients(combine(out), leaf, module)})
    assert_parity(*found, 1e-9)
    statistics = [dict(m.classifier.named_buffers()) for m in (head, printed)]
    statistics[1]["0.running_mean"] = statistics[1]["0.running_mean"] * kappa
    statistics[1]["0.running_var"] = statistics[1]["0.running_var"] * kappa**2
    assert_parity(*statistics, 1e-10)


def test_norm_eps_is_of_the_first_norm_alone() -> None:
    head = GGAMHead(C, K, hidden_size=10, norm_eps=0.25)
    assert (head.classifier[0].eps, head.classifier[2].eps) == (0.25, 1e-5)
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="norm_eps"):
            GGAMHead(C, K, norm_eps=wrong)


@pytest.mark.parametrize("attention", OPTIONS["attention"])
@pytest.mark.parametrize("spatial_norm", OPTIONS["spatial_norm"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("pool_type", POOLS)
def test_head_and_reference_agree(
    pool_type: str, backend: str, spatial_norm: str, attention: str, device: torch.device
) -> None:
    options = {"attention": attention, "spatial_norm": spatial_norm, **POOLS[pool_type], "hidden_size": 0}
    if pool_type == "map":
        options["build_classifier"] = lambda: nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, K), nn.Tanh())
    head, reference = pair(device=device, backend=backend, **options)
    assert head.attention_scale == reference.attention_scale == "unit_mean"
    tolerance = 1e-10
    if backend == "triton":
        head, tolerance = head.float(), 1e-4
    x, target, found = features(device), hard_target(device), []
    for module in (head, reference):
        leaf = x.to(next(module.parameters()).dtype).requires_grad_()
        out = module(leaf, target)
        found.append({**out._asdict(), **gradients(combine(out), leaf, module)})
    assert_parity(*found, tolerance)


@KINDS
@pytest.mark.parametrize("attention", ["channel_spatial", "spatial", "channel"])
@pytest.mark.parametrize("size", [7, 14, 28])
def test_a_fresh_head_has_a_plain_heads_logits(
    size: int, attention: str, kind: type[GGAMHeadBase], device: torch.device
) -> None:
    head = kind(512, 200, hidden_size=0, attention=attention).to(device)
    x = torch.randn(16, 512, size, size, device=device).relu()
    plain = nn.Linear(512, 200).to(device)
    plain.load_state_dict(head.classifier.state_dict())
    with torch.no_grad():
        found, expected = head(x), plain(x.mean((2, 3)))
        spread = (found - plain.bias).std() / (expected - plain.bias).std()
    assert 0.8 < found.std() / expected.std() < 1.25
    assert 0.8 < spread < 1.25  # the bias apart


def separable(classes: Tensor, channels: int, size: int) -> Tensor:
    """Maps as a ReLU leaves them, some channels of which are stronger in one class."""
    x = torch.randn(len(classes), channels, size, size, device=classes.device)
    shift = (torch.arange(channels, device=x.device) % 4 == classes.unsqueeze(1)).float()
    return (x + 0.5 * shift[:, :, None, None]).relu()


@pytest.mark.parametrize("scale", OPTIONS["attention_scale"])
@pytest.mark.parametrize("attention", ["channel_spatial", "spatial", "channel"])
def test_training_and_evaluation_are_equally_sure(attention: str, scale: str, device: torch.device) -> None:
    """After 40 steps, where torch's running variance still is what it started from."""
    torch.manual_seed(0)
    head = GGAMHead(256, 4, attention=attention, attention_scale=scale).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(40):
        target = torch.randint(4, (32,), device=device)
        optimizer.zero_grad()
        fused_ggam_loss(head, separable(target, 256, 7), target).loss.backward()
        optimizer.step()
    target = torch.arange(256, device=device) % 4
    x = separable(target, 256, 7)
    with torch.no_grad():
        logits = {training: copy.deepcopy(head).train(training)(x) for training in (True, False)}
    sure = {training: y.softmax(1).amax(1).mean().item() for training, y in logits.items()}
    assert all((y.argmax(1) == target).float().mean() > 0.95 for y in logits.values())
    assert abs(sure[True] - sure[False]) < 0.1, sure


# State


@KINDS
@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_without_a_scale_is_a_printed_one(nested: bool, kind: type[GGAMHeadBase]) -> None:
    """Files from before there was a choice."""
    printed = kind(C, K, hidden_size=0, attention_scale="printed")
    old = nn.Sequential(nn.Linear(2, 2), printed) if nested else printed
    state = {k: v for k, v in old.state_dict().items() if not k.endswith("unit_mean")}
    before = list(state)
    head = kind(C, K, hidden_size=0)
    model = nn.Sequential(nn.Linear(2, 2), head) if nested else head
    model.load_state_dict(state, strict=True)
    assert list(state) == before
    assert head.attention_scale == "printed"
    assert not head.unit_mean
    x = features(torch.device("cpu"), torch.float32)
    assert torch.equal(head(x), printed(x))


@KINDS
@pytest.mark.parametrize("saved", OPTIONS["attention_scale"])
@pytest.mark.parametrize("own", OPTIONS["attention_scale"])
def test_a_state_dict_brings_its_scale(own: str, saved: str, kind: type[GGAMHeadBase]) -> None:
    source, head = (kind(C, K, hidden_size=0, attention_scale=scale) for scale in (saved, own))
    head.load_state_dict(source.state_dict())
    assert head.attention_scale == saved
    assert f"attention_scale='{saved}'" in repr(head)
    x = features(torch.device("cpu"), torch.float32)
    assert torch.equal(head(x), source(x))
    twin = copy.deepcopy(head)
    assert twin.attention_scale == saved
    assert torch.equal(twin(x), source(x))


@pytest.mark.parametrize("scale", OPTIONS["attention_scale"])
def test_a_state_dict_of_something_else_changes_nothing(scale: str) -> None:
    """Loaded with strict=False: nothing of it is the head's."""
    head = GGAMHead(C, K, hidden_size=0, attention_scale=scale)
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": head})
    for state in ({}, {"backbone.weight": torch.zeros(2, 2)}):
        model.load_state_dict(state, strict=False)
        head.load_state_dict(state, strict=False)
        assert head.attention_scale == scale
        assert head.unit_mean == (scale == "unit_mean")


def test_the_scale_may_be_set() -> None:
    head, printed = GGAMHead(C, K, hidden_size=0), GGAMHead(C, K, hidden_size=0, attention_scale="printed")
    printed.load_state_dict({**head.state_dict(), "unit_mean": torch.tensor(False)})
    head.attention_scale = "printed"
    assert not head.state_dict()["unit_mean"]
    x = features(torch.device("cpu"), torch.float32)
    assert torch.equal(head(x), printed(x))
    with pytest.raises(ValueError, match="attention_scale must be one of 'unit_mean', 'printed'; got 'mean'"):
        head.attention_scale = "mean"
    with pytest.raises(ValueError, match="attention_scale must be one of"):
        GGAMHead(C, K, attention_scale="mean")


@pytest.mark.parametrize("preset", [presets.PAPER, presets.RELEASE])
def test_presets_are_printed(preset: Any) -> None:
    assert GGAMHead(32, K, **preset).attention_scale == "printed"


def test_meta_parameters_keep_the_scale() -> None:
    head = GGAMHead(C, K, hidden_size=0, attention_scale="printed", device="meta")
    real = GGAMHead(C, K, hidden_size=0)
    head.load_state_dict(real.state_dict(), assign=True)
    assert head.attention_scale == "unit_mean"
    x = features(torch.device("cpu"), torch.float32)
    assert relative_error(head(x), real(x)) == 0
