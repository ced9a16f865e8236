"""Compares a head with its eager reference, for the tests."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ggam_fast import GGAMHead, GGAMOutput
from ggam_fast.reference import GGAMHeadReference

C, H, W, K, N = 24, 3, 5, 6, 4

OPTIONS: dict[str, Sequence[Any]] = {
    "attention": ("channel_spatial", "channel", "spatial", "none"),
    "spatial_norm": ("softmax", "sum", "sigmoid"),
    "attention_scale": ("unit_mean", "printed"),
    "cam_at": ("features", "attended"),
    "cam_class": ("label", "predicted"),
    "cam_detach": (True, False),
    "cam_norm": ("sigmoid", "softmax", "standardized", "standardized_softmax"),
    "cam_temperature": (1.0, 0.3),
    "divergence": ("symmetric", "forward", "reverse"),
    "guidance_reduction": (None, "mean", "sum"),
    "drop_rate": (0.0, 0.4),
}


CANCELLING = ("guidance_loss", "classifier.0.bias", "classifier.1.bias")


def draws(options: dict[str, Sequence[Any]], count: int, seed: object) -> Iterator[dict[str, Any]]:
    """`count` combinations in which every value of every option comes equally often."""
    generator = random.Random(repr(seed))
    columns = {}
    for name, values in options.items():
        column = [values[i % len(values)] for i in range(count)]
        generator.shuffle(column)
        columns[name] = column
    for i in range(count):
        drawn = {name: column[i] for name, column in columns.items()}
        if drawn.get("attention") in ("spatial", "none") and drawn.get("cam_norm") == "standardized_softmax":
            drawn["cam_norm"] = "standardized"  # the other is refused
        yield drawn


def pair(
    *args: Any,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    backend: str = "torch",
    **options: Any,
) -> tuple[GGAMHead, GGAMHeadReference]:
    """A head, and the reference with equal parameters: larger than freshly initialised ones, so that every
    term of every gradient is felt, and not so large that a softmax saturates."""
    build = options.pop("build_classifier", None)
    options.setdefault("rd_channels", 6)
    heads = [
        kind(*(args or (C, K)), **options, **({"classifier": build()} if build else {}))
        for kind in (GGAMHead, GGAMHeadReference)
    ]
    head, reference = (h.to(dtype) for h in heads)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    reference.load_state_dict(head.state_dict())
    head, reference = head.to(device), reference.to(device)
    head.backend = backend
    return head, reference  # type: ignore[return-value]


def features(
    device: torch.device, dtype: torch.dtype = torch.float64, layout: str = "nchw", n: int = N
) -> Tensor:
    """(N, C, H, W) features as a ReLU would leave them, in one of the memory layouts."""
    shape = {"sliced": (n, C, H + 1, W), "transposed": (n, C, W, H)}.get(layout, (n, C, H, W))
    # Drawn on the CPU, for the same numbers on every device.
    x = torch.randn(shape, dtype=torch.float64).to(device, dtype).relu_().mul_(2)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return x[:, :, 1:]
    return x.transpose(2, 3) if layout == "transposed" else x


def as_format(x: Tensor, input_fmt: str) -> Tensor:
    """Features (N, C, H, W) as "NCHW", "NHWC" or "NLC"."""
    if input_fmt == "NCHW":
        return x
    return x.permute(0, 2, 3, 1) if input_fmt == "NHWC" else x.flatten(2).transpose(1, 2)


def soft_target(device: torch.device, n: int = N, k: int = K) -> Tensor:
    return torch.rand(n, k, dtype=torch.float64).softmax(1).to(device)


def hard_target(device: torch.device, n: int = N, k: int = K) -> Tensor:
    return torch.randint(k, (n,)).to(device)


def combine(out: GGAMOutput | Tensor, seed: int = 0) -> Tensor:
    """A random linear functional of all outputs that carry a gradient, the same for equal seeds."""
    tensors = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for x in tensors:
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
        if x.requires_grad:
            total = total + (x.double() * weights).sum()
    return total


def gradients(loss: Tensor, x: Tensor, module: nn.Module, create_graph: bool = False) -> dict[str, Tensor]:
    """d loss / d features and all parameters; zeros where nothing reaches them."""
    inputs = {"features": x, **dict(module.named_parameters())}
    inputs = {name: p for name, p in inputs.items() if p.requires_grad}
    found = torch.autograd.grad(
        loss,
        list(inputs.values()),
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, found, strict=True))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||"""
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp_min(1e-300))


def assert_parity(
    found: dict[str, Tensor] | GGAMOutput, expected: dict[str, Tensor] | GGAMOutput, tolerance: float
) -> None:
    """Relative error at most `tolerance` for each tensor.

    What is zero but for rounding is judged against the largest tensor: a bias in front of batch norm, and a
    divergence of two nearly equal distributions.
    """
    found = found._asdict() if isinstance(found, GGAMOutput) else found
    expected = expected._asdict() if isinstance(expected, GGAMOutput) else expected
    assert found.keys() == expected.keys()
    largest = max((float(e.detach().double().norm()) for e in expected.values()), default=0.0)
    for name, e in expected.items():
        f = found[name]
        assert f.shape == e.shape, f"{name}: shape {tuple(f.shape)}, expected {tuple(e.shape)}"
        error = float((f.detach().double() - e.detach().double()).norm())
        norm = float(e.detach().double().norm())
        eps = torch.finfo(f.dtype if name in CANCELLING else torch.float64).eps
        zero = 8 * eps * largest
        assert error <= tolerance * norm + zero, f"{name}: relative error {error / max(norm, 1e-300):.2e}"
