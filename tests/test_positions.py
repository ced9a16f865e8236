"""Guidance of positions: T pulled to the class activation map, beside the guidance of channels."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ggam_fast import GGAMHead, GGAMLoss, GGAMOutput, checks, presets
from ggam_fast.functional import channel_sum, fused_ggam_loss, position_loss
from ggam_fast.reference import GGAMHeadReference
from tests import parity
from tests.parity import H, W, assert_parity, draws, gradients, hard_target, pair

if checks.TRITON_AVAILABLE:
    from ggam_fast import recorded

NORMS = ("relu", "standardized_softmax")
CASES: dict[str, Any] = {
    "attention": ("channel_spatial", "spatial"),
    "pool_type": ("avg", "max", "avg", "flatten"),
    "position_guidance": NORMS,
    "cam_at": ("features", "attended", "features"),
    "cam_class": ("label", "predicted"),
    "cam_detach": (True, True, False),
    "cam_norm": ("sigmoid", "standardized"),
    "divergence": ("symmetric", "forward"),
    "ignore_index": (None, 0),
    "hidden_size": (8, 0),
    "attention_scale": ("unit_mean", "printed"),
    "position_weight": (2.0, None, 0.0),
    "guidance_weight": (0.3, 0.0),
}


def run(
    head: Any, x: Tensor, target: Tensor, form: str, weight: float, position_weight: float | None
) -> dict[str, Tensor]:
    """Outputs, the loss and all gradients."""
    if form == "fused":
        loss, out = fused_ggam_loss(head, x, target, guidance_weight=weight, position_weight=position_weight)
    else:
        out = head(x, target)
        loss = GGAMLoss(weight, 0.0, head.ignore_index, position_weight=position_weight)(out, target)
    outputs = {name: y.detach() for name, y in out._asdict().items()}
    return {"loss": loss.detach(), **outputs, **gradients(loss, x, head)}


def compare(case: dict[str, Any], backend: str, tolerance: float, device: torch.device) -> None:
    case = dict(case)
    weights = case.pop("guidance_weight"), case.pop("position_weight")
    if case["pool_type"] == "flatten":
        case["feat_size"] = (H, W)
    dtype = torch.float64 if backend == "torch" else torch.float32
    head, reference = pair(device=device, dtype=dtype, backend=backend, position_temperature=0.7, **case)
    x = parity.features(device, dtype).requires_grad_()
    target = torch.tensor([1, 2, 0, 4], device=device)
    exact = run(reference.double(), x.detach().double().requires_grad_(), target, "drop-in", *weights)
    assert exact["position_loss"] > 1e-3
    for form in ("drop-in", "fused"):
        assert_parity(run(head, x, target, form, *weights), exact, tolerance)


@pytest.mark.parametrize("case", list(draws(CASES, 24, "positions")), ids=str)
def test_the_reference(case: dict[str, Any], device: torch.device) -> None:
    compare(case, "torch", 1e-9, device)


@pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="needs triton")
@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("case", list(draws(CASES, 12, "kernels")), ids=str)
def test_the_kernels(
    case: dict[str, Any], replayed: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "enabled", replayed)
    monkeypatch.setattr(recorded, "_recordings", {})
    compare(case, "triton", 2e-4, device)
    replays = replayed and case["pool_type"] == "avg" and case["cam_detach"]
    assert any(r is not None for r in recorded._recordings.values()) == replays


@pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="needs triton")
@pytest.mark.parametrize("form", ["drop-in", "fused"])
def test_weights_and_temperature_are_not_in_the_key(
    form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "_recordings", {})
    options: dict[str, Any] = {"position_guidance": "standardized_softmax", "hidden_size": 0}
    head, _ = pair(device=device, dtype=torch.float32, backend="triton", **options)
    x, target = parity.features(device, torch.float32).requires_grad_(), hard_target(device)
    for temperature, weight in ((1.0, 1.0), (0.3, 5.0)):
        head.position_temperature = temperature
        found = run(head, x, target, form, 0.3, weight)
        recorded.enabled = False
        try:
            assert_parity(found, run(head, x, target, form, 0.3, weight), 1e-5)
        finally:
            recorded.enabled = True
    kinds = [key[0] for key, value in recorded._recordings.items() if value is not None]
    assert kinds.count("fused" if form == "fused" else "guided") == 1
    head.position_guidance = "relu"
    assert run(head, x, target, form, 0.3, 1.0)["position_loss"] != found["position_loss"]


@pytest.mark.parametrize("backend", ["torch", *["triton"] * checks.TRITON_AVAILABLE])
@pytest.mark.parametrize("cam_detach", [True, False])
def test_second_order(cam_detach: bool, backend: str, device: torch.device) -> None:
    """Derivatives of the gradients, for constant q."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    options: dict[str, Any] = {"cam_detach": cam_detach, "position_guidance": "relu", "hidden_size": 0}
    head, reference = pair(device=device, dtype=dtype, backend=backend, **options)
    x, target = parity.features(device, dtype).requires_grad_(), hard_target(device)
    twin = x.detach().double().requires_grad_()
    found = []
    for h, a in ((head, x), (reference.double(), twin)):
        loss = GGAMLoss(0.3, position_weight=2.0)(h(a, target), target)
        first = gradients(loss, a, h, create_graph=True)
        found.append(gradients(sum(g.square().sum() for g in first.values()), a, h))  # type: ignore[arg-type]
    assert_parity(found[0], found[1], 1e-9 if backend == "torch" else 1e-3)


def test_positions_reach_nothing_but_u(device: torch.device) -> None:
    """dL/dU = (T - q) / N of the position loss alone."""
    options: dict[str, Any] = {"attention": "spatial", "position_guidance": "relu", "hidden_size": 0}
    head, _ = pair(device=device, **options)
    x, target = parity.features(device).requires_grad_(), hard_target(device)
    out = head(x, target)
    (da,) = torch.autograd.grad(out.position_loss, x)
    v = head.classifier.weight[target]
    q = channel_sum(x.detach(), v.detach()).relu()
    q = q / q.sum((1, 2), keepdim=True)
    expected = (out.spatial_attention - q) / len(x) / x.shape[1]
    torch.testing.assert_close(da, expected.unsqueeze(1).expand_as(x))
    torch.testing.assert_close(out.position_loss, position_loss(out.spatial_attention, target=q))
    aligned = channel_sum(x.detach(), v.detach())
    torch.testing.assert_close(out.position_loss, position_loss(out.spatial_attention, aligned))


def test_saturated_attention(device: torch.device) -> None:
    """Where T underflows, the loss and its gradient stay finite: log T is never the log of T."""
    options: dict[str, Any] = {"attention": "spatial", "position_guidance": "relu", "hidden_size": 0}
    for kind in (GGAMHead, GGAMHeadReference):
        head = kind(2, 3, **options)
        x = torch.tensor([[0.0, 500.0], [0.0, 900.0]]).view(1, 2, 1, 2).requires_grad_()
        torch.nn.init.constant_(head.classifier.weight, 0.0)
        out = head(x, torch.tensor([0]))
        (da,) = torch.autograd.grad(out.position_loss, x)
        assert out.spatial_attention.view(-1).tolist() == [0.0, 1.0]
        torch.testing.assert_close(out.position_loss, torch.tensor(350 - 0.6931472))  # q is uniform
        torch.testing.assert_close(da, torch.tensor([-0.25, 0.25]).expand(1, 2, 1, 2))


# ---- the output and the loss


CPU = torch.device("cpu")


def output(**options: Any) -> GGAMOutput:
    head, _ = pair(device=CPU, **{"position_guidance": "relu", **options})
    return head(parity.features(CPU).requires_grad_(), hard_target(CPU))


def test_the_output_is_five_values_and_a_loss() -> None:
    out = output()
    logits, s, t, beta, guidance = out
    assert all(x is y for x, y in zip((logits, s, t, beta, guidance), out[:5], strict=True))
    assert out.position_loss is not None
    assert len(out) == 5
    assert out._asdict().keys() == {*GGAMOutput._fields, "position_loss"}
    assert out._replace(logits=beta).position_loss is out.position_loss
    assert out._replace(logits=beta).logits is beta
    assert isinstance(out, GGAMOutput)
    leaves = pytree.tree_leaves(out)
    assert len(leaves) == 6
    assert leaves[5] is out.position_loss
    doubled = pytree.tree_map(lambda x: 2 * x.detach(), out)
    torch.testing.assert_close(doubled.position_loss, 2 * out.position_loss.detach())
    for again in (pickle.loads(pickle.dumps(doubled)), copy.deepcopy(doubled)):
        assert torch.equal(again.position_loss, doubled.position_loss)
    assert output(position_guidance="none").position_loss is None
    with pytest.raises(RuntimeError, match="made this output again from its five values"):
        _ = type(out)(*out).position_loss
    with torch.no_grad():
        assert not output().position_loss.requires_grad  # type: ignore[union-attr]


def test_parts_and_weights() -> None:
    out, target = output(), hard_target(CPU)
    loss, entropy, guidance, positions = GGAMLoss(0.3, position_weight=2.0, return_parts=True)(out, target)
    assert positions is out.position_loss
    torch.testing.assert_close(loss, entropy + 0.3 * guidance + 2 * positions)
    default = GGAMLoss(0.3, return_parts=True)(out, target)
    torch.testing.assert_close(default.loss, entropy + 0.3 * guidance + positions)
    plain = GGAMLoss(0.3, return_parts=True)(output(position_guidance="none"), target)
    assert float(plain.positions) == 0
    each = GGAMLoss(0, reduction="none", position_weight=0)(out, target)
    torch.testing.assert_close(each.mean(), entropy)
    with pytest.raises(ValueError, match="position_weight must be finite and not negative; got -1"):
        GGAMLoss(position_weight=-1)
    with pytest.raises(ValueError, match="position_weight=1 needs a head with position_guidance"):
        GGAMLoss(position_weight=1)(output(position_guidance="none"), target)
    with pytest.raises(ValueError, match='reduction="none" needs position_weight=0, or a head'):
        GGAMLoss(0, reduction="none")(out, target)
    with pytest.warns(UserWarning, match="got plain logits"):
        GGAMLoss(0, position_weight=1)(out.logits, target)
    head, _ = pair(device=CPU)
    with pytest.raises(ValueError, match="position_weight=1 needs a head with position_guidance"):
        fused_ggam_loss(head, parity.features(CPU), target, position_weight=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "channel"}, 'got attention=\'channel\': use attention="channel_spatial" or "spatial"'),
        ({"attention": "none"}, "guides the map of spatial attention"),
        ({"spatial_norm": "sum"}, "got spatial_norm='sum': use spatial_norm=\"softmax\""),
        ({**presets.RELEASE}, "compares two distributions over positions"),
        ({"position_temperature": 0}, "position_temperature must be positive and finite; got 0"),
        ({"position_guidance": "softmax"}, "position_guidance must be one of 'none', 'relu'"),
    ],
)
@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
def test_what_cannot_work_is_refused(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(8, 3, **{"position_guidance": "relu", **options})


def test_a_state_dict_knows() -> None:
    head = GGAMHead(16, 3, position_guidance="relu")
    with pytest.warns(UserWarning, match="position_guidance='none', saved with 'relu'"):
        GGAMHead(16, 3).load_state_dict(head.state_dict())
    assert "position_guidance='relu'" in repr(head)


# ---- the plain function


def test_the_plain_function(device: torch.device) -> None:
    u = torch.randn(3, 4, 5, dtype=torch.float64, device=device, requires_grad=True)
    t = u.flatten(1).softmax(1).view_as(u)
    q = torch.rand_like(u).flatten(1).softmax(1).view_as(u)
    each = position_loss(t, target=q, reduction="none")
    torch.testing.assert_close(each, (q * (q.log() - t.log())).sum((1, 2)))
    torch.testing.assert_close(position_loss(t, target=q), each.mean())
    (du,) = torch.autograd.grad(each.sum(), u)
    torch.testing.assert_close(du, (t - q).detach())
    torch.testing.assert_close(position_loss(t, target=t.detach()), t.new_zeros(()))
    one = torch.zeros_like(u)
    one[:, 1, 2] = 3.0
    torch.testing.assert_close(position_loss(t, one, reduction="none"), -t[:, 1, 2].log())
    z = position_loss(t, q, position_guidance="standardized_softmax", position_temperature=0.5)
    flat = q.flatten(1)
    z_score = (flat - flat.mean(1, keepdim=True)) / flat.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(z, position_loss(t, target=(2 * z_score).softmax(1).view_as(u)))
    assert float(position_loss(t[:0].detach(), q[:0])) == 0
    with pytest.raises(ValueError, match="needs either class_map or target; got neither"):
        position_loss(t)
    with pytest.raises(ValueError, match="needs either class_map or target; got both"):
        position_loss(t, q, target=q)
    with pytest.raises(ValueError, match="target must be the shape of spatial_attention"):
        position_loss(t, target=q[:1])
    with pytest.raises(ValueError, match="spatial_attention must be floating-point"):
        position_loss(t[0, 0], q)
