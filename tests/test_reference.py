"""The reference itself, against formulas in numpy and in the paper's configuration."""

import inspect

import numpy as np
import pytest
import torch

from ggam_fast import GGAMHead, presets
from ggam_fast.reference import GGAMHeadReference
from tests.parity import features, hard_target


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def numpy_head(a: np.ndarray, p: dict[str, np.ndarray], kappa: int) -> list[np.ndarray]:
    """The paper with average pooling and one linear layer, loops over images; a is (N, C, L)."""
    logits, channel, spatial = [], [], []
    for image in a:
        g = image.mean(1)
        hidden = np.maximum(p["fc1.weight"] @ g + p["fc1.bias"], 0)
        s = softmax(p["fc2.weight"] @ hidden + p["fc2.bias"], 0)
        u = sum(s[c] * image[c] for c in range(len(s)))
        t = softmax(u, 0)
        z = np.array([kappa * (image[c] * t).mean() for c in range(len(s))])
        logits.append(p["classifier.weight"] @ z + p["classifier.bias"])
        channel.append(s), spatial.append(t)
    return [np.stack(x) for x in (logits, channel, spatial)]


@pytest.mark.parametrize(("scale", "kappa"), [("printed", 1), ("unit_mean", 6)])
def test_against_numpy(scale: str, kappa: int) -> None:
    """Values by hand, beta by central differences of the label's score, the loss from its definition."""
    n, c, h, w, k = 2, 4, 2, 3, 3
    reference = GGAMHeadReference(c, k, rd_channels=2, hidden_size=0, attention_scale=scale).double()
    p = {name: t.detach().numpy() for name, t in reference.state_dict().items()}
    x = torch.rand(n, c, h, w, dtype=torch.float64)
    target = torch.tensor([2, 0])
    out = reference(x, target)

    a = x.flatten(2).numpy()
    logits, channel, spatial = numpy_head(a, p, kappa)
    np.testing.assert_allclose(out.logits.detach(), logits, rtol=1e-12)
    np.testing.assert_allclose(out.channel_attention.detach(), channel, rtol=1e-12)
    np.testing.assert_allclose(out.spatial_attention.detach().flatten(1), spatial, rtol=1e-12)

    beta, step = np.zeros((n, c)), 1e-5
    for image in range(n):
        for i in range(c):
            for l in range(h * w):
                scores = []
                for sign in (1, -1):
                    moved = a.copy()
                    moved[image, i, l] += sign * step
                    scores.append(numpy_head(moved, p, kappa)[0][image, target[image]])
                beta[image, i] += (scores[0] - scores[1]) / (2 * step) / (h * w)
    np.testing.assert_allclose(out.cam_weights, beta, rtol=1e-5, atol=1e-10)

    q = 1 / (1 + np.exp(-beta))
    loss = ((channel * np.log(channel / q)).sum(1) + (q * np.log(q / channel)).sum(1)).mean() / 2
    np.testing.assert_allclose(out.guidance_loss.detach(), loss, rtol=1e-8)


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
def test_the_default_is_the_paper_at_a_plain_heads_scale(kind: type[GGAMHead]) -> None:
    defaults = {n: p.default for n, p in inspect.signature(kind).parameters.items()}
    default, paper = kind(32, 5), kind(32, 5, **presets.PAPER)
    for name, value in presets.PAPER.items():
        assert name in defaults
        if name == "attention_scale":
            assert (getattr(default, name), getattr(paper, name), value) == (
                "unit_mean",
                "printed",
                "printed",
            )
        elif name != "rd_ratio":
            assert getattr(default, name) == getattr(paper, name) == value, name
    assert default.rd_channels == paper.rd_channels == 2


def test_same_constructor_state_and_outputs(device: torch.device) -> None:
    assert inspect.signature(GGAMHead.__init__) == inspect.signature(GGAMHeadReference.__init__)
    head, reference = GGAMHead(24, 6), GGAMHeadReference(24, 6)
    assert {n: v.shape for n, v in head.state_dict().items()} == {
        n: v.shape for n, v in reference.state_dict().items()
    }
    assert [n for n in head.state_dict() if n.startswith("_")] == ["_extra_state"]
    x, target = features(device, torch.float32), hard_target(device)
    for module in (head, reference):
        out = module.to(device)(x, target)
        assert out._fields == (
            "logits", "channel_attention", "spatial_attention", "cam_weights", "guidance_loss",
        )  # fmt: skip
        assert module(x).shape == out.logits.shape


def test_reference_without_gradients(device: torch.device) -> None:
    reference = GGAMHeadReference(24, 6, hidden_size=10).to(device).eval()
    x, target = features(device, torch.float32), hard_target(device)
    expected = reference(x, target)
    with torch.no_grad():
        out = reference(x, target)
    assert not any(t.requires_grad for t in out)
    torch.testing.assert_close(tuple(out), tuple(t.detach() for t in expected))
