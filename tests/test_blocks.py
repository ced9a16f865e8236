"""Guidance for SE, ECA and CBAM blocks, against autograd through the same operations written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ggam_fast import GGAMHead, GGAMLoss, GGAMOutput, guide_block
from ggam_fast.functional import guidance_loss

layers = pytest.importorskip("timm.layers")
timm = pytest.importorskip("timm")
cbam = pytest.importorskip("timm.layers.cbam")
squeeze_excite = pytest.importorskip("timm.layers.squeeze_excite")

C, K, N = 16, 5, 3


def se_gate(block: Any, a: Tensor) -> Tensor:
    return block.fc2(F.relu(block.bn(block.fc1(a.mean((2, 3), keepdim=True))))).sigmoid()


def eca_gate(block: Any, a: Tensor) -> Tensor:
    return block.conv(a.mean((2, 3)).unsqueeze(1)).sigmoid().view(N, C, 1, 1)


def circular_gate(block: Any, a: Tensor) -> Tensor:
    y = F.pad(a.mean((2, 3)).unsqueeze(1), (block.padding, block.padding), mode="circular")
    return block.conv(y).sigmoid().view(N, C, 1, 1)


def cbam_gate(block: Any, a: Tensor) -> Tensor:
    mlp = block.channel
    pooled = (a.mean((2, 3), keepdim=True), a.amax((2, 3), keepdim=True))
    return sum(mlp.fc2(F.relu(mlp.fc1(x))) for x in pooled).sigmoid()  # type: ignore[union-attr, return-value]


def cbam_map(block: Any, b: Tensor) -> Tensor:
    return block.spatial.conv(torch.cat([b.mean(1, keepdim=True), b.amax(1, keepdim=True)], 1)).sigmoid()


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "SE": (lambda: layers.SEModule(C, rd_channels=4), se_gate),
    "effective SE": (
        lambda: squeeze_excite.EffectiveSEModule(C),
        lambda block, a: F.hardsigmoid(block.fc(a.mean((2, 3), keepdim=True))),
    ),
    "ECA": (lambda: layers.EcaModule(C), eca_gate),
    "circular ECA": (lambda: layers.CecaModule(C), circular_gate),
    "CBAM": (lambda: cbam.CbamModule(C, rd_channels=4), cbam_gate),
}  # fmt: skip


class Model(nn.Module):
    """A convolution, a block, and layers above it of which the first works in place."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.below, self.block = nn.Conv2d(3, C, 3), block
        self.above = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(C, 8, 3), nn.GELU())
        self.fc = nn.Linear(8, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.above(self.block(self.below(x))).mean((2, 3)))

    def guided(
        self, x: Tensor, y: Tensor, gate: Any, detach: bool, cam_at: str, **options: Any
    ) -> GGAMOutput:
        """The same written out."""
        a = self.below(x)
        s = gate(self.block, a)
        d, t = a * s, torch.ones(N, *a.shape[2:], dtype=a.dtype)
        if hasattr(self.block, "spatial"):
            t = cbam_map(self.block, d)
            d, t = d * t, t.squeeze(1)
        logits = self.fc(self.above(d.clone()).mean((2, 3)))
        # Soft targets weight the scores.
        score = (logits * y).sum() if y.is_floating_point() else logits.gather(1, y[:, None]).sum()
        at = a if cam_at == "features" else d
        (gradient,) = torch.autograd.grad(score, at, create_graph=True)
        beta = gradient.mean((2, 3))
        beta = beta.detach() if detach else beta
        s = s.flatten(1) / s.flatten(1).sum(1, keepdim=True)
        return GGAMOutput(logits, s, t, beta, guidance_loss(s, beta, **options))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("cam_at", ["features", "attended"])
def test_beta_and_gradients_are_those_of_autograd(name: str, detach: bool, cam_at: Any) -> None:
    if (name, detach, cam_at) == ("effective SE", False, "features"):
        pytest.skip("torch has no second derivative of hardsigmoid")
    torch.manual_seed(0)
    make, gate = BLOCKS[name]
    model, x = Model(make()).double(), torch.randn(N, 3, 8, 8, dtype=torch.float64)
    options: dict[str, Any] = {"cam_norm": "standardized", "divergence": "forward", "cam_temperature": 0.5}
    for y in (torch.tensor([0, 3, 4]), torch.rand(N, K, dtype=torch.float64)):
        out = guide_block(model, model.block, x, y, cam_at=cam_at, cam_detach=detach, **options)
        expected = model.guided(x, y, gate, detach, cam_at, **options)
        for found, wanted in zip(out, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        named = list(model.parameters())
        gradients = [
            torch.autograd.grad(GGAMLoss(0.3)(o, y), named, allow_unused=True, materialize_grads=True)
            for o in (out, expected)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert not model.block._forward_hooks
    assert not model.block._forward_pre_hooks


def test_the_options_of_the_head() -> None:
    torch.manual_seed(0)
    model, x, y = Model(layers.SEModule(C)), torch.randn(N, 3, 8, 8), torch.tensor([0, -1, 4])
    out = guide_block(model, model.block, x, y, ignore_index=-1, cam_norm="sigmoid")
    assert not out.cam_weights[1].count_nonzero()
    kept = torch.tensor([0, 2])
    torch.testing.assert_close(
        out.guidance_loss, guidance_loss(out.channel_attention[kept], out.cam_weights[kept])
    )
    predicted = out.logits.argmax(1)
    torch.testing.assert_close(
        guide_block(model, model.block, x, y * 0, cam_class="predicted").cam_weights,
        guide_block(model, model.block, x, predicted).cam_weights,
    )
    with torch.no_grad():
        quiet = guide_block(model, model.block, x, predicted)
    assert not any(o.requires_grad for o in quiet)


def test_a_block_of_a_timm_model_trains() -> None:
    """An EfficientNet, whose SE blocks stand in the middle, frozen but for one block."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=K)
    images, target = torch.randn(N, 3, 64, 64), torch.tensor([0, 3, 4])
    block = model.blocks[-1][-1].se
    GGAMLoss(0.1)(guide_block(model, block, images, target), target).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.requires_grad_(False)
    block.requires_grad_(True)
    optimizer, losses = torch.optim.SGD(block.parameters(), lr=0.1), []
    for _ in range(3):
        out = guide_block(model, block, images, target)
        optimizer.zero_grad()
        GGAMLoss(guidance_weight=1.0)(out, target).backward()
        optimizer.step()
        losses.append(out.guidance_loss.item())
    assert losses[-1] < losses[0]
    torch.testing.assert_close(out.channel_attention.sum(1), torch.ones(N))


def test_maps_in_nhwc() -> None:
    torch.manual_seed(0)
    block, twin = squeeze_excite.SqueezeExciteCl(C, rd_channels=4), layers.SEModule(C, rd_channels=4)
    for name in ("fc1", "fc2"):
        getattr(twin, name).weight.data = getattr(block, name).weight.data[:, :, None, None]
        getattr(twin, name).bias.data = getattr(block, name).bias.data
    x, y, fc = torch.randn(N, C, 4, C), torch.tensor([0, 3, 4]), nn.Linear(C, K)
    last = guide_block(lambda x: fc(block(x.permute(0, 2, 3, 1)).mean((1, 2))), block, x, y)
    first = guide_block(lambda x: fc(twin(x).mean((2, 3))), twin, x, y)
    for a, b in zip(last, first, strict=True):
        torch.testing.assert_close(a, b)


def test_the_block_as_the_heads_classifier() -> None:
    """No backward through the backbone: the head's own Grad-CAM is at the block's input."""
    torch.manual_seed(0)
    block = layers.SEModule(C, rd_channels=4)
    top = nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, K))
    head = GGAMHead(C, K, attention="none", pool_type="", classifier=top)
    features, target = torch.randn(N, C, 4, 4), torch.tensor([0, 3, 4])
    out, guided = head(features, target), guide_block(head, block, features, target)
    torch.testing.assert_close(out.cam_weights, guided.cam_weights)
    torch.testing.assert_close(out.logits, guided.logits)


class Twice(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.above(self.block(self.block(self.below(x)))).mean((2, 3)))


def test_errors() -> None:
    x, y = torch.randn(N, 3, 8, 8), torch.tensor([0, 3, 4])
    model, twice = Model(layers.SEModule(C)), Twice(layers.SEModule(C))
    block, own = model.block, twice.block
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: guide_block(model, model.fc, x, y), TypeError, r"channel.gate; got Linear: give gate="),
        (lambda: guide_block(model, "block", x, y), TypeError, r"block must be a module"),  # type: ignore[arg-type]
        (lambda: guide_block(model, layers.SEModule(C), x, y), ValueError, r"it called it 0 times"),
        (lambda: guide_block(twice, own, x, y), ValueError, r"it called it 2 times"),
        (lambda: guide_block(model, block, x, y, gate=nn.ReLU()), ValueError, r"without its gate"),
        (lambda: guide_block(model, block, x, y, gate=block.fc1), ValueError, r"gate must give one"),
        (lambda: guide_block(model, block, x, y + 9), ValueError, r"target must be in"),
        (lambda: guide_block(model, block, x, y, cam_norm="tanh"), ValueError, r"cam_norm must be"),  # type: ignore[arg-type]
    ]  # fmt: skip
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    assert not model.block._forward_hooks
    assert not model.block.gate._forward_hooks
