"""GGAMHead against its eager reference, option by option: outputs, gradients, second order."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.head.heads import BACKENDS, HEADS, MapClassifier, poolings
from tests.parity import (
    OPTIONS,
    C,
    K,
    as_format,
    assert_parity,
    combine,
    draws,
    features,
    gradients,
    hard_target,
    pair,
    soft_target,
)

LAYOUTS = ("nchw", "channels_last", "sliced", "transposed")
AXES = {
    **OPTIONS,
    "training": (True, False),
    "soft": (True, False),
    "layout": LAYOUTS,
    "input_fmt": ("NCHW", "NCHW", "NHWC", "NLC"),
}
CASES = [
    pytest.param(head, {**HEADS[head], **draw}, id=f"{head}-{i}")
    for head in HEADS
    for i, draw in enumerate(draws(AXES, 24, head))
]


def compare(
    options: dict[str, Any], device: torch.device, backend: str = "torch", second: bool = True
) -> None:
    """Outputs, gradients and second-order gradients of a head and of the reference."""
    options = dict(options)
    training, soft, layout = options.pop("training"), options.pop("soft"), options.pop("layout")
    if options["pool_type"] == "":
        options["build_classifier"] = lambda: MapClassifier(options["input_fmt"])
    head, reference = pair(device=device, backend=backend, **options)
    tolerance, dtype = 1e-10, torch.float64
    if backend == "triton":
        head, tolerance, dtype = head.float(), 1e-4, torch.float32
    if dtype != torch.float64 and device.type != "cpu":
        head.drop.p = reference.drop.p = 0.0  # a GPU draws another mask for float64
    target = soft_target(device) if soft else hard_target(device)
    base = features(device, layout=layout)
    if training and not options["cam_detach"] and any(isinstance(m, nn.BatchNorm1d) for m in head.modules()):
        second = False  # the loss is of second order then, and torch's batch norm ends there
    found: list[Any] = []
    for module, x in ((head, base.to(dtype).double().to(dtype)), (reference, base.to(dtype).double())):
        module.train(training)
        leaf = x.requires_grad_()
        torch.manual_seed(7)  # one dropout mask for both
        out = module(as_format(leaf, options["input_fmt"]), target)
        first = gradients(combine(out), leaf, module)
        graph, higher = {}, {}
        if second:  # another path: the fused backward has no derivative, the contractions do
            graph = gradients(combine(out), leaf, module, create_graph=True)
            if any(g.requires_grad for g in graph.values()):
                higher = gradients(sum(combine(g, 3) for g in graph.values()), leaf, module)  # type: ignore[arg-type]
        found.append((out, first, graph, higher, dict(module.named_buffers())))
    for mine, theirs in zip(*found, strict=True):
        assert_parity(mine, theirs, tolerance)


@pytest.mark.parametrize(("head", "options"), CASES)
def test_matches_the_reference(head: str, options: dict[str, Any], device: torch.device) -> None:
    compare(options, device)


@pytest.mark.parametrize(("head", "options"), [c for c in CASES if c.id.endswith(("-0", "-1"))])
def test_kernels_match_the_reference(head: str, options: dict[str, Any], device: torch.device) -> None:
    compare(options, device, backend="triton", second=False)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("cam_detach", [True, False])
def test_a_soft_target_can_be_learned(cam_detach: bool, own: bool, device: torch.device) -> None:
    """Through beta, where it is not constant: y is the target's mean of the scores."""
    build = (lambda: nn.Sequential(nn.Linear(C, 8), nn.GELU(), nn.Linear(8, K))) if own else None
    heads = pair(
        device=device, hidden_size=0, cam_detach=cam_detach, cam_norm="standardized", build_classifier=build
    )
    x, target = features(device), soft_target(device)
    found, expected = (
        torch.autograd.grad(h(x, t).guidance_loss + 0.0 * t.sum(), t)[0]
        for h in heads
        for t in [target.clone().requires_grad_()]
    )
    assert bool(expected.any()) != cam_detach
    torch.testing.assert_close(found, expected)


def test_frozen_parameters_guide_the_features(device: torch.device) -> None:
    head, reference = pair(device=device, hidden_size=0)
    x, target = features(device), hard_target(device)
    found = []
    for module in (head.requires_grad_(False), reference.requires_grad_(False)):
        leaf = x.clone().requires_grad_()
        found.append(gradients(combine(module(leaf, target)), leaf, module))
    assert_parity(*found, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@poolings(hidden_size=10)
def test_one_image(options: dict[str, Any], backend: str, device: torch.device) -> None:
    head, reference = pair(device=device, backend=backend, **options)
    x, target = features(device, n=1), hard_target(device, 1)
    head, reference = head.float().eval(), reference.eval()
    assert_parity(head(x.float(), target), reference(x, target), 1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (14, 14)])
@pytest.mark.parametrize("channels", [1, 2, 65])
def test_other_sizes(shape: tuple[int, int], channels: int, device: torch.device) -> None:
    head, reference = pair(channels, 3, device=device, rd_channels=1, hidden_size=0)
    x, target = torch.rand(2, channels, *shape, device=device, dtype=torch.float64), hard_target(device, 2, 3)
    found = []
    for module in (head, reference):
        leaf = x.clone().requires_grad_()
        out = module(leaf, target)
        found.append({**out._asdict(), **gradients(combine(out), leaf, module)})
    assert_parity(*found, 1e-10)
