"""Preset RELEASE against the authors' guided script, which is rewritten here in float64 from its description
alone, and the loading of its checkpoints."""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ggam_fast import GGAMHead, GGAMLoss, presets
from ggam_fast.reference import GGAMHeadReference
from tests.parity import relative_error

C, K, N, SIZE = 32, 7, 5, 4


class SqueezeExcite(nn.Module):
    """Two 1x1 convolutions on the mean of the map, softmax over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(C, C // 16, 1)
        self.fc2 = nn.Conv2d(C // 16, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        return self.fc2(F.relu(self.fc1(pooled))).softmax(dim=1)


class Network(nn.Module):
    """Backbone, channel weights, sigmoid map, maximum over the whole map, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
        self.se_module = SqueezeExcite()
        self.s_se_module = self.se_module  # the same module under a second name
        self.classifier = nn.Sequential(
            nn.BatchNorm1d(C), nn.Linear(C, 512), nn.BatchNorm1d(512), nn.ELU(), nn.Linear(512, K)
        )

    def head(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores, channel weights, the sigmoid map, and the attended map whose gradient is looked at."""
        channel = self.se_module(maps)
        spatial = (maps * channel).sum(dim=1, keepdim=True).sigmoid()
        attended = maps * spatial
        pooled = F.max_pool2d(attended, kernel_size=SIZE).flatten(1)
        return self.classifier(pooled), channel.flatten(1), spatial.squeeze(1), attended


class Step(NamedTuple):
    """What one training step of the script leaves behind."""

    logits: Tensor
    channel: Tensor
    spatial: Tensor
    cam: Tensor
    kl: Tensor
    loss: Tensor
    grads: dict[str, Tensor]


def authors_step(network: Network, maps: Tensor, target: Tensor) -> Step:
    """Two backward passes: the best scores for the CAM by a hook, then CE + KL."""
    maps = maps.clone().requires_grad_()
    logits, channel, spatial, attended = network.head(maps)
    caught: list[Tensor] = []
    handle = attended.register_hook(caught.append)
    logits.max(dim=1).values.sum().backward(retain_graph=True)
    handle.remove()
    cam = caught[0].mean(dim=(2, 3))
    weights = cam.softmax(dim=1).detach()
    network.zero_grad()
    maps.grad = None

    kl = F.kl_div(weights.log(), channel, reduction="sum")
    loss = F.cross_entropy(logits, target) + kl
    loss.backward()
    grads = {
        name: p.grad
        for name, p in network.named_parameters()
        if p.grad is not None and "features" not in name
    }
    assert maps.grad is not None
    return Step(logits, channel, spatial, cam, kl, loss, {"maps": maps.grad, **grads})


@pytest.fixture
def network(device: torch.device) -> Network:
    network = Network().to(device, torch.float64)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return network


def our_name(name: str) -> str:
    return name.removeprefix("se_module.")


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
@pytest.mark.parametrize("training", [True, False])
def test_one_step(kind: type[GGAMHead], training: bool, network: Network, device: torch.device) -> None:
    # Theirs is torch's norm, whose running statistics remember 0 and 1.
    head = kind(C, K, norm_layer=nn.BatchNorm1d, **presets.RELEASE).to(device, torch.float64)
    head.load_release_state_dict(network.state_dict())
    maps = torch.randn(N, C, SIZE, SIZE, dtype=torch.float64, device=device).relu_()
    target = torch.randint(K, (N,), device=device)
    theirs = authors_step(network.train(training), maps, target)

    leaf = maps.clone().requires_grad_()
    out = head.train(training)(leaf, target)
    loss = GGAMLoss(guidance_weight=1.0)(out, target)
    loss.backward()
    assert relative_error(out.logits, theirs.logits) < 1e-10
    assert relative_error(out.channel_attention, theirs.channel) < 1e-10
    assert relative_error(out.spatial_attention, theirs.spatial) < 1e-10
    assert relative_error(out.cam_weights, theirs.cam) < 1e-10
    assert relative_error(out.guidance_loss, theirs.kl) < 1e-10
    assert relative_error(loss, theirs.loss) < 1e-10

    ours = {"maps": leaf.grad, **{name: p.grad for name, p in head.named_parameters()}}
    assert {our_name(n) for n in theirs.grads} == set(ours)
    largest = max(float(g.norm()) for g in theirs.grads.values())
    for name, g in theirs.grads.items():
        found = ours[our_name(name)]
        assert found is not None
        difference = float((found - g.view_as(found)).norm())
        assert difference <= 1e-10 * float(g.norm()) + 1e-14 * largest, name
    statistics = dict(network.classifier.named_buffers())
    for name, buffer in head.classifier.named_buffers():
        torch.testing.assert_close(buffer, statistics[name])


def renamed(state: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    """The names DataParallel gives around the whole model, or around its parts."""
    if style == "plain":
        return state
    if style == "whole":
        return {f"module.{name}": value for name, value in state.items()}
    return {name.replace(".", ".module.", 1): value for name, value in state.items()}


@pytest.mark.parametrize("style", ["plain", "whole", "parts"])
@pytest.mark.parametrize("dropped", ["", "se_module.", "s_se_module.", "features."])
@pytest.mark.parametrize("scale", ["printed", "unit_mean"])
def test_load_release_state_dict(
    scale: str, style: str, dropped: str, network: Network, device: torch.device
) -> None:
    """Either copy of the attention will do, with or without the backbone."""
    state = {n: v for n, v in network.state_dict().items() if not dropped or not n.startswith(dropped)}
    # A checkpoint of theirs is printed, whatever the head was built for.
    head = GGAMHead(C, K, **{**presets.RELEASE, "attention_scale": scale}).to(device, torch.float64)
    head.load_release_state_dict(renamed(state, style))
    assert head.attention_scale == "printed"
    maps = torch.rand(N, C, SIZE, SIZE, dtype=torch.float64, device=device)
    expected = network.eval().head(maps)[0]
    assert relative_error(head.eval()(maps), expected) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"classifier.4.weight": torch.zeros(K + 1, 512)},
            r"classifier\.4\.weight is \(8, 512\), expected \(7, 512\)",
        ),
        ({"se_module.fc1.weight": torch.zeros(3, C, 1, 1)}, r"fc1\.weight is \(3, 32\), expected \(2, 32\)"),
        ({"se_module.fc1.weight": torch.zeros(2, C, 3, 3)}, r"fc1\.weight"),
        ({"classifier.4.weight": None}, r"missing classifier\.4\.weight"),
        ({"extra.weight": torch.zeros(1)}, r"unexpected extra\.weight"),
    ],
)
def test_a_state_dict_that_does_not_fit_loads_nothing(
    change: dict[str, Tensor | None], message: str, network: Network, device: torch.device
) -> None:
    head = GGAMHead(C, K, **presets.RELEASE).to(device, torch.float64)
    before = copy.deepcopy(head.state_dict())
    state = {n: v for n, v in {**network.state_dict(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        head.load_release_state_dict(state)
    assert all(torch.equal(v, before[n]) for n, v in head.state_dict().items())
