"""The stateless API: each function against the plain formula, in every format, with its gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ggam_fast import functional
from tests.parity import (
    OPTIONS,
    C,
    H,
    K,
    N,
    W,
    as_format,
    features,
    hard_target,
    pair,
    relative_error,
)

FORMATS = ("NCHW", "NHWC", "NLC")
POOLS = ("avg", "max", "flatten", "")
HIDDEN = 6


def mlp(device: torch.device) -> dict[str, Tensor]:
    shapes = {"fc1_weight": (HIDDEN, C), "fc1_bias": (HIDDEN,), "fc2_weight": (C, HIDDEN), "fc2_bias": (C,)}
    return {
        name: (torch.randn(shape, dtype=torch.float64, device=device) * 0.4).requires_grad_()
        for name, shape in shapes.items()
    }


def plain_attention(
    x: Tensor, p: dict[str, Tensor], attention: str, norm: str, scale: str
) -> tuple[Tensor, Tensor, Tensor]:
    """D (N, C, H, W), S (N, C) and T (N, H, W) in one line each."""
    unit_mean = scale == "unit_mean"
    hidden = torch.relu(x.mean((2, 3)) @ p["fc1_weight"].T + p["fc1_bias"])
    s = torch.softmax(hidden @ p["fc2_weight"].T + p["fc2_bias"], 1)
    if attention in ("spatial", "none"):
        s = torch.full_like(s, 1 / C)
    if attention == "none":
        return x, s, torch.ones_like(x[:, 0])
    if attention == "channel":
        return x * s[:, :, None, None] * (C if unit_mean else 1), s, torch.ones_like(x[:, 0])
    u = (s[:, :, None, None] * x).sum(1)
    if norm == "softmax":
        t = torch.exp(u) / torch.exp(u).sum((1, 2), keepdim=True)
    else:
        t = 1 / (1 + torch.exp(-u)) if norm == "sigmoid" else u / u.sum((1, 2), keepdim=True)
    kappa = H * W if unit_mean and norm != "sigmoid" else 1
    return x * t.unsqueeze(1) * kappa, s, t


def pool(d: Tensor, pool_type: str, input_fmt: str) -> Tensor:
    if pool_type == "":
        return as_format(d, input_fmt)
    reduced = {"avg": d.mean((2, 3)), "max": d.flatten(2).max(2).values, "flatten": d.flatten(1)}
    return reduced[pool_type]


@pytest.mark.parametrize("input_fmt", FORMATS)
@pytest.mark.parametrize("name", ["channel_sum", "spatial_sum"])
def test_contractions(name: str, input_fmt: str, device: torch.device) -> None:
    x = features(device).requires_grad_()
    size, equation = ((N, C), "nchw,nc->nhw") if name == "channel_sum" else ((N, H, W), "nchw,nhw->nc")
    weights = torch.randn(size, dtype=torch.float64, device=device, requires_grad=True)
    tokens = input_fmt == "NLC"
    given = weights.flatten(1) if tokens and name == "spatial_sum" else weights
    found = getattr(functional, name)(as_format(x, input_fmt), given, input_fmt=input_fmt)
    expected = torch.einsum(equation, x, weights)
    if tokens and name == "channel_sum":
        expected = expected.flatten(1)
    torch.testing.assert_close(found, expected)
    g = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, (x, weights), g) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pool_type", POOLS)
@pytest.mark.parametrize("attention", OPTIONS["attention"])
@pytest.mark.parametrize("scale", OPTIONS["attention_scale"])
@pytest.mark.parametrize(
    ("spatial_norm", "input_fmt"), list(zip(OPTIONS["spatial_norm"], FORMATS, strict=True))
)
def test_ggam_attention(
    pool_type: str, attention: str, scale: str, spatial_norm: str, input_fmt: str, device: torch.device
) -> None:
    x, p = features(device).requires_grad_(), mlp(device)
    uses_mlp = attention in ("channel_spatial", "channel")
    found = functional.ggam_attention(
        as_format(x, input_fmt), **(p if uses_mlp else {}), attention=attention, spatial_norm=spatial_norm,
        pool_type=pool_type, attention_scale=scale, input_fmt=input_fmt,
    )  # fmt: skip
    d, s, t = plain_attention(x, p, attention, spatial_norm, scale)
    t = t.flatten(1) if input_fmt == "NLC" else t
    expected = (pool(d, pool_type, input_fmt), s, t)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)

    inputs = [x, *p.values()] if uses_mlp else [x]
    seeds = [torch.randn_like(b) for b in expected]
    derivatives = []
    for outputs in (found, expected):
        y = sum((a * b).sum() for a, b in zip(outputs, seeds, strict=True) if a.requires_grad)
        fused = torch.autograd.grad(y, inputs, retain_graph=True)
        first = torch.autograd.grad(y, inputs, create_graph=True)
        z = sum(g.square().sum() for g in first)
        second = [torch.zeros_like(x)]
        if isinstance(z, Tensor) and z.requires_grad:
            second = list(torch.autograd.grad(z, inputs, allow_unused=True, materialize_grads=True))
        derivatives.append([*fused, *first, *second])
    for a, b in zip(*derivatives, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("pool_type", POOLS)
def test_attention_under_autocast(pool_type: str, create_graph: bool, device: torch.device) -> None:
    """autograd.grad called inside autocast, as a gradient penalty does, is the same to the last bit."""
    x = features(device).float().requires_grad_()
    p = {name: t.detach().float().requires_grad_() for name, t in mlp(device).items()}
    results = []
    for enabled in (True, False):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            out = functional.ggam_attention(x, **p, pool_type=pool_type)
            y = out.attended.square().sum() + out.spatial_attention.square().sum()
            first = torch.autograd.grad(y, [x, *p.values()], create_graph=create_graph)
            results.append([*out, *first])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tied_weights_count_once(device: torch.device) -> None:
    """fc2 computed from fc1: the second-order path must not follow it inside the node too."""
    x, p = features(device), mlp(device)
    w = p["fc1_weight"]
    g = torch.randn(N, C, dtype=torch.float64, device=device)

    def attended(**changed: Tensor) -> Tensor:
        return functional.ggam_attention(x, **{**p, "fc2_weight": w.t(), **changed}).attended

    (once,) = torch.autograd.grad(attended(), w, g)
    (graph,) = torch.autograd.grad(attended(), w, g, create_graph=True)
    assert relative_error(graph, once) < 1e-10


@pytest.mark.parametrize("pool_type", POOLS)
def test_vmap_and_func_grad_over_attention(pool_type: str, device: torch.device) -> None:
    x, p = torch.stack([features(device), features(device)]), mlp(device)

    def run(x: Tensor) -> Tensor:
        return functional.ggam_attention(x, **p, pool_type=pool_type).attended

    found = torch.func.vmap(run)(x)
    for a, b in zip(found, x, strict=True):
        assert relative_error(a, run(b)) < 1e-12
    grads = torch.func.vmap(torch.func.grad(lambda x: run(x).square().sum()))(x)
    for a, b in zip(grads, x, strict=True):
        leaf = b.clone().requires_grad_()
        run(leaf).square().sum().backward()
        assert relative_error(a, leaf.grad) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize("pool_type", POOLS)
@pytest.mark.parametrize("cam_at", OPTIONS["cam_at"])
@pytest.mark.parametrize("attention", OPTIONS["attention"])
@pytest.mark.parametrize("scale", OPTIONS["attention_scale"])
@pytest.mark.parametrize("input_fmt", FORMATS)
def test_grad_cam_weights(
    pool_type: str, cam_at: str, attention: str, scale: str, input_fmt: str, device: torch.device
) -> None:
    x, p = features(device).requires_grad_(), mlp(device)
    d, _, _ = plain_attention(x, p, attention, "softmax", scale)
    d = d * 1
    pooled = pool(d, pool_type, input_fmt)
    v = torch.randn_like(pooled).requires_grad_()
    (gradient,) = torch.autograd.grad(pooled, x if cam_at == "features" else d, v, create_graph=True)
    expected = gradient.mean((2, 3))
    arguments = (as_format(x, input_fmt), v)
    options: dict[str, Any] = {
        **p, "attention": attention, "pool_type": pool_type, "attention_scale": scale, "cam_at": cam_at
    }  # fmt: skip
    found = functional.grad_cam_weights(*arguments, input_fmt=input_fmt, **options)
    assert relative_error(found, expected) < 1e-10
    assert not found.requires_grad

    graph = functional.grad_cam_weights(*arguments, input_fmt=input_fmt, differentiable=True, **options)
    assert relative_error(graph, expected) < 1e-10
    inputs, seed = [x, v, *p.values()], torch.randn_like(expected)
    grads = [
        torch.autograd.grad(beta, inputs, seed, allow_unused=True, materialize_grads=True)
        for beta in (graph, expected)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", OPTIONS["attention_scale"])
@pytest.mark.parametrize("pool_type", ["avg", "max"])
def test_grad_cam_weights_are_the_heads(pool_type: str, scale: str, device: torch.device) -> None:
    head, _ = pair(device=device, hidden_size=0, pool_type=pool_type, attention_scale=scale)
    x, target = features(device), hard_target(device)
    p = {
        "fc1_weight": head.fc1.weight, "fc1_bias": head.fc1.bias,
        "fc2_weight": head.fc2.weight, "fc2_bias": head.fc2.bias,
    }  # fmt: skip
    found = functional.grad_cam_weights(
        x, head.classifier.weight[target], **p, pool_type=pool_type, attention_scale=scale
    )
    out = head(x, target)
    assert relative_error(found, out.cam_weights) < 1e-10
    loss = functional.guidance_loss(out.channel_attention, found)
    assert relative_error(loss, out.guidance_loss) < 1e-10


@pytest.mark.parametrize("input_fmt", FORMATS)
@pytest.mark.parametrize("weighted", [True, False])
def test_grad_cam_means(input_fmt: str, weighted: bool, device: torch.device) -> None:
    x = features(device).requires_grad_()
    g = torch.randn_like(x)
    t = torch.rand(N, H, W, dtype=torch.float64, device=device) if weighted else torch.ones_like(x[:, 0])
    shape = (N, H * W) if input_fmt == "NLC" else (N, H, W)
    found = functional.grad_cam_means(
        as_format(x, input_fmt), as_format(g, input_fmt), t.reshape(shape) if weighted else None,
        input_fmt=input_fmt,
    )  # fmt: skip
    assert not any(f.requires_grad for f in found)
    torch.testing.assert_close(found.cam_weights, (g * t.unsqueeze(1)).mean((2, 3)))
    torch.testing.assert_close(found.grad_map, (g * x).sum(1).detach().reshape(shape))


@pytest.mark.parametrize("function", ["ggam_attention", "printed", "channel_sum", "spatial_sum"])
def test_kernels_agree(function: str, device: torch.device) -> None:
    x, p = features(device).float(), mlp(device)
    arguments = {
        "channel_sum": {"channel_weights": torch.randn(N, C, device=device)},
        "spatial_sum": {"spatial_weights": torch.randn(N, H, W, device=device)},
        "ggam_attention": p,
        "printed": {**p, "attention_scale": "printed"},
    }[function]
    run = getattr(functional, "ggam_attention" if function == "printed" else function)
    found, expected = (run(x, **arguments, backend=backend) for backend in ("triton", "torch"))
    for a, b in zip(*((y,) if isinstance(y, Tensor) else y for y in (found, expected)), strict=True):
        assert relative_error(a, b) < 1e-5


def test_classes_are_not_needed(device: torch.device) -> None:
    """K appears nowhere: the functions know maps and channels alone."""
    out = functional.ggam_attention(features(device), attention="spatial")
    assert out.attended.shape == (N, C)
    assert K not in out.attended.shape
