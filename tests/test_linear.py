"""The layer as one autograd node: torch's own values and gradients, whatever its TF32 switches."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ggam_fast import GGAMHead, checks, functional
from tests.parity import K, N, hard_target, relative_error

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast import ops

GIVEN = [("x", "weight", "bias"), ("x",), ("weight",), ("bias",)]


def inputs(device: torch.device, given: tuple[str, ...] = GIVEN[0]) -> list[Tensor]:
    shapes = {"x": (5, 7), "weight": (3, 7), "bias": (3,)}
    return [torch.randn(shape, device=device).requires_grad_(name in given) for name, shape in shapes.items()]


@pytest.mark.parametrize("given", GIVEN, ids="-".join)
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients(given: tuple[str, ...], has_bias: bool, device: torch.device) -> None:
    x, weight, bias = inputs(device, given)
    found = ops.TRITON.linear(x, weight, bias if has_bias else None)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, bias)]
    expected = F.linear(exact[0], exact[1], exact[2] if has_bias else None)
    assert relative_error(found, expected) < 1e-6
    pairs = list(zip((x, weight, bias), exact, strict=True))[: 3 if has_bias else 2]
    asked = [(t, e) for t, e in pairs if t.requires_grad]
    if not asked:
        assert not found.requires_grad
        return
    # of a sum: the gradient that comes in has no strides of its own
    for scale in (1.0, torch.randn_like(found)):
        ours = torch.autograd.grad((found * scale).sum(), [t for t, _ in asked], retain_graph=True)
        theirs = torch.autograd.grad((expected * scale).sum(), [e for _, e in asked], retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) < 1e-6


def test_second_derivatives(device: torch.device) -> None:
    given = inputs(device)
    exact = [t.detach().double().requires_grad_() for t in given]
    # Of a tenth: the sine of large numbers turns their rounding into its own.
    found, expected = (
        torch.autograd.grad((layer(*leaves) / 10).sin().sum(), leaves, create_graph=True)
        for layer, leaves in ((ops.TRITON.linear, given), (F.linear, exact))
    )
    again = [
        torch.autograd.grad(sum(g.cos().sum() for g in first), leaves)
        for first, leaves in ((found, given), (expected, exact))
    ]
    for a, b in zip((*found, *again[0]), (*expected, *again[1]), strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("hidden_size", [260, 0])
def test_a_head_has_one_set_of_logits(hidden_size: int, device: torch.device) -> None:
    """With a graph and without one, and of the loss in one piece: the same products, so the same bits."""
    head = GGAMHead(300, K, hidden_size=hidden_size, backend="triton", device=device)
    x, target = torch.randn(N, 300, 3, 5, device=device), hard_target(device)
    with torch.no_grad():
        expected = head(x, target).logits
    assert torch.equal(head(x, target).logits, expected)
    assert torch.equal(functional.fused_ggam_loss(head, x, target).out.logits, expected)


@pytest.mark.gpu
def test_torchs_switches_change_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    head = GGAMHead(512, K, device=device).train()
    x = torch.randn(N, 512, 5, 5, device=device, requires_grad=True)
    target = hard_target(device)

    def step() -> list[Tensor]:
        out = head(x, target)
        loss = F.cross_entropy(out.logits, target) + out.guidance_loss
        return [out.logits, *torch.autograd.grad(loss, [x, *head.parameters()])]

    expected = step()
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    for a, b in zip(step(), expected, strict=True):
        assert torch.equal(a, b)
