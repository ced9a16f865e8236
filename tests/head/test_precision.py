"""Half precision, float32, autocast and mixed types."""

import copy
from typing import Any

import pytest
import torch

from tests.head.heads import BACKENDS, POOLS, pooled_classifier, poolings
from tests.parity import (
    OPTIONS,
    assert_parity,
    combine,
    draws,
    features,
    gradients,
    hard_target,
    pair,
    relative_error,
)


def half_errors(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[float, float]]:
    """{tensor: (head's error, eager reference's error)} against float64 on the same upcast inputs."""
    head, reference = pair(device=device, **options)
    runs = [m.to(dtype) for m in (head, reference)]
    runs.append(copy.deepcopy(reference).double())
    base, target = features(device).to(dtype), hard_target(device)
    results = []
    for module in runs:
        x = base.to(next(module.parameters()).dtype).requires_grad_()
        out = module(x, target)
        results.append({**out._asdict(), **gradients(combine(out), x, module)})
    mine, eager, golden = results
    # Zero but for rounding: no relative error to speak of.
    names = [n for n in golden if n not in ("classifier.0.bias", "classifier.1.bias")]
    return {n: (relative_error(mine[n], golden[n]), relative_error(eager[n], golden[n])) for n in names}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cam_norm", OPTIONS["cam_norm"])
@poolings(hidden_size=10)
def test_half_precision_is_as_good_as_eager(
    options: dict[str, Any], cam_norm: str, dtype: torch.dtype, device: torch.device
) -> None:
    eps = torch.finfo(dtype).eps
    for name, (mine, eager) in half_errors({**options, "cam_norm": cam_norm}, dtype, device).items():
        assert mine <= 2 * eager + 2 * eps, f"{name}: {mine:.2e}, eager {eager:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_on_average_better_than_eager(dtype: torch.dtype, device: torch.device) -> None:
    errors: dict[str, list[tuple[float, float]]] = {}
    for options in draws({"spatial_norm": OPTIONS["spatial_norm"], "pool_type": ("avg", "max")}, 12, dtype):
        for name, both in half_errors({**options, "hidden_size": 10}, dtype, device).items():
            errors.setdefault(name, []).append(both)
    for name, both in errors.items():
        mine, eager = (sum(column) / len(both) for column in zip(*both, strict=True))
        assert mine <= eager, f"{name}: mean {mine:.2e}, eager {eager:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_accuracy(backend: str, device: torch.device) -> None:
    head, reference = pair(device=device, backend=backend, hidden_size=10)
    head, x, target = head.float(), features(device).float(), hard_target(device)
    xs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    outs = [module(leaf, target) for module, leaf in zip((head, reference), xs, strict=True)]
    assert_parity(*outs, 1e-5)
    found, expected = (
        gradients(combine(o), x, m) for o, x, m in zip(outs, xs, (head, reference), strict=True)
    )
    assert_parity(found, expected, 1e-4)


@pytest.mark.parametrize("pool_type", ["avg", "max", "flatten"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing_in_the_closed_form(
    pool_type: str, dtype: torch.dtype, device: torch.device
) -> None:
    head, _ = pair(device=device, hidden_size=10, **POOLS[pool_type])
    head, x, target = head.float().eval(), features(device).to(dtype).requires_grad_(), hard_target(device)
    plain = head(x, target)
    with torch.autocast(device.type, torch.bfloat16):
        out = head(x, target)
        logits = head(x)
    for a, b in zip(out, plain, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert torch.equal(logits, plain.logits)
    for a, b in zip(*(gradients(combine(o), x, head).values() for o in (out, plain)), strict=True):
        assert torch.equal(a, b)


def test_autocast_reaches_a_custom_classifier(device: torch.device) -> None:
    head, _ = pair(device=device, build_classifier=pooled_classifier)
    head, x, target = head.float(), features(device).float().requires_grad_(), hard_target(device)
    exact = head(x, target)
    with torch.autocast(device.type, torch.bfloat16):
        out = head(x, target)
    assert out.logits.dtype == torch.bfloat16
    assert out.channel_attention.dtype == out.cam_weights.dtype == torch.float32
    assert torch.equal(out.channel_attention, exact.channel_attention)
    assert relative_error(out.cam_weights, exact.cam_weights) < 0.05
    combine(out).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_half_features_with_float32_parameters(device: torch.device) -> None:
    """A frozen half-precision backbone under a float32 head: parameters and their gradients stay float32."""
    head, reference = pair(device=device, hidden_size=10)
    head = head.float()
    x, target = features(device).bfloat16(), hard_target(device)
    leaf = x.clone().requires_grad_()
    out, expected = head(leaf, target), reference(x.double(), target)
    assert_parity(out, expected, 1e-5)
    grads = gradients(combine(out), leaf, head)
    assert grads.pop("features").dtype == torch.bfloat16
    assert {g.dtype for g in grads.values()} == {torch.float32}
