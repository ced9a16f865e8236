"""Results are reproducible and independent of the batch, with hooks, frozen parts, empty batches and NaN."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import ggam_fast.head
import ggam_fast.step
from ggam_fast import GGAMHead, GGAMLoss
from ggam_fast.functional import fused_ggam_loss
from ggam_fast.norm import SettlingBatchNorm1d
from tests.head.heads import BACKENDS, pooled_classifier, poolings
from tests.parity import (
    OPTIONS,
    C,
    H,
    K,
    N,
    W,
    assert_parity,
    combine,
    features,
    gradients,
    hard_target,
    pair,
    relative_error,
)


def guided_step(form: str, head: GGAMHead, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Logits, S, T and beta of each image, and the gradient of the loss for its features."""
    leaf = x.clone().requires_grad_()
    if form == "fused":
        loss, out = fused_ggam_loss(head, leaf, target, guidance_weight=0.5)
    else:
        out = head(leaf, target)
        loss = GGAMLoss(0.5)(out, target)
    return (*out[:4], torch.autograd.grad(loss, leaf)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@poolings(hidden_size=10, drop_rate=0.3)
def test_run_to_run_bitwise(options: dict[str, Any], backend: str, device: torch.device) -> None:
    head, _ = pair(device=device, backend=backend, **options)
    head, x, target = head.float().train(), features(device).float().requires_grad_(), hard_target(device)
    runs = []
    for _ in range(2):
        twin = copy.deepcopy(head)
        torch.manual_seed(5)
        out = twin(x, target)
        runs.append([*out, *gradients(combine(out), x, twin).values(), *twin.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@poolings(hidden_size=10)
def test_images_do_not_depend_on_their_batch(options: dict[str, Any], device: torch.device) -> None:
    head, _ = pair(device=device, **options)
    head.eval()
    x, target = features(device), hard_target(device)
    together = head(x, target)
    for n in range(N):
        alone = head(x[n : n + 1], target[n : n + 1])
        for a, b in zip(alone[:4], together[:4], strict=True):
            assert relative_error(a[0], b[n]) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["drop_in", "fused"])
@pytest.mark.parametrize("spatial_norm", OPTIONS["spatial_norm"])
@poolings(hidden_size=10)
def test_bad_values_stay_in_their_image(
    options: dict[str, Any], spatial_norm: str, form: str, backend: str, device: torch.device
) -> None:
    head, _ = pair(device=device, backend=backend, spatial_norm=spatial_norm, **options)
    head, x, target = head.float().eval(), features(device).float(), hard_target(device)
    clean = guided_step(form, head, x, target)
    others = [0, 2, 3]
    for bad in (float("nan"), float("inf"), 3e38):
        broken = x.clone()
        broken[1, 2, 1, 1] = bad
        found = guided_step(form, head, broken, target)
        for one, other in zip(clean, found, strict=True):
            assert torch.equal(one[others], other[others])
        assert not torch.equal(found[0][1], clean[0][1])
        assert bad == 3e38 or not found[0][1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["drop_in", "fused"])
def test_same_bits_over_a_hundred_repeats(form: str, backend: str, device: torch.device) -> None:
    head = GGAMHead(4, 3, rd_channels=2, hidden_size=0, backend=backend, device=device).train()
    x, target = torch.randn(2, 4, 2, 2, device=device), torch.tensor([2, 0], device=device)
    first = guided_step(form, head, x, target)
    for _ in range(99 if backend == "torch" or device.type == "cuda" else 4):  # the interpreter is slow
        assert all(torch.equal(a, b) for a, b in zip(guided_step(form, head, x, target), first, strict=True))


def test_same_bits_in_every_thread(device: torch.device) -> None:
    """On the torch backend; tests/test_recorded.py has the kernels."""
    head, _ = pair(device=device, backend="torch", hidden_size=10)
    head, x, target = head.float().eval(), features(device).float(), hard_target(device)
    expected = guided_step("fused", head, x, target)

    def repeats(_: int) -> bool:
        runs = [guided_step("fused", head, x, target) for _ in range(25)]
        return all(torch.equal(a, b) for run in runs for a, b in zip(run, expected, strict=True))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(repeats, range(4)))


@pytest.mark.parametrize("backend", BACKENDS)
@poolings(hidden_size=10)
def test_the_place_in_a_batch(options: dict[str, Any], backend: str, device: torch.device) -> None:
    """Matrix products and batch norm may round a row by its place.  Without them before T, its bits stay."""
    order = [3, 1, 0, 2]
    for attention in ("channel_spatial", "spatial"):
        arguments = {**options, "attention": attention, "backend": backend, "cam_at": "features"}
        head, _ = pair(device=device, **arguments)
        head, x, target = head.float().eval(), features(device).float(), hard_target(device)
        before = guided_step("drop_in", head, x, target)
        after = guided_step("drop_in", head, x[order], target[order])
        for one, other in zip(before, after, strict=True):
            assert relative_error(other, one[order].double()) < 1e-5
        if attention == "spatial":
            assert torch.equal(after[2], before[2][order])  # T


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@poolings(hidden_size=10)
def test_sum_of_an_all_zero_map(options: dict[str, Any], backend: str, device: torch.device) -> None:
    reference_wanted = backend == "reference"
    both = pair(
        device=device, spatial_norm="sum", backend="torch" if reference_wanted else backend, **options
    )
    module = both[reference_wanted].float().eval()
    x, target = features(device).float(), hard_target(device)
    x[1] = 0
    x.requires_grad_()
    out = module(x, target)
    torch.testing.assert_close(out.spatial_attention[1], torch.full((H, W), 1 / (H * W), device=device))
    grads = gradients(GGAMLoss(0.5)(out, target), x, module)
    assert all(g.isfinite().all() for g in grads.values())
    assert grads["features"][1].count_nonzero() > 0


def test_without_target_beta_is_never_computed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = pair(device=device, hidden_size=10)
    head.eval()
    x, target = features(device), hard_target(device)
    expected = head(x, target).logits

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed for a forward without target")

    for name in ("cam_and_guidance", "grad_cam_weights"):
        monkeypatch.setattr(ggam_fast.step, name, refuse)
    for name in ("kl_guidance", "scores", "custom_scores"):
        monkeypatch.setattr(ggam_fast.head, name, refuse)
    assert torch.equal(head(x), expected)
    with pytest.raises(AssertionError, match="without target"):
        head(x, target)


@poolings(hidden_size=10)
@pytest.mark.parametrize("attention", OPTIONS["attention"])
@pytest.mark.parametrize("cam_at", OPTIONS["cam_at"])
@pytest.mark.parametrize("cam_norm", OPTIONS["cam_norm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_same_comes_out(
    backend: str, cam_norm: str, cam_at: str, attention: str, options: dict[str, Any], device: torch.device
) -> None:
    """Where beta and the guidance loss are one stage."""
    if cam_norm == "standardized_softmax" and attention in ("spatial", "none"):
        pytest.skip("is refused")
    divergence = "forward" if cam_norm == "softmax" else "symmetric"
    options = {**options, "cam_norm": cam_norm, "cam_at": cam_at, "divergence": divergence}
    dtype = torch.float32 if backend == "triton" else torch.float64
    head, _ = pair(device=device, dtype=dtype, attention=attention, backend=backend, **options)
    head.eval()
    x, target = features(device, dtype), hard_target(device)
    with torch.no_grad():
        found = head(x, target)
    expected = head(x, target)
    assert_parity(found, expected, 1e-5 if backend == "triton" else 1e-10)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert not any(x.requires_grad for x in found)


@pytest.mark.parametrize("cam_at", OPTIONS["cam_at"])
def test_beta_may_be_changed_in_place(cam_at: str, device: torch.device) -> None:
    """It is detached, and the caller's."""
    head, _ = pair(device=device, cam_at=cam_at)
    x, target = features(device).requires_grad_(), hard_target(device)
    (expected,) = torch.autograd.grad(head(x, target).guidance_loss, x)
    out = head(x, target)
    out.cam_weights.mul_(2)
    assert torch.equal(torch.autograd.grad(out.guidance_loss, x)[0], expected)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, SettlingBatchNorm1d])
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
@pytest.mark.parametrize("guided", [True, False])
def test_batch_norm_statistics_move_once_a_step(
    guided: bool, momentum: float | None, kind: type[nn.BatchNorm1d], device: torch.device
) -> None:
    head, _ = pair(device=device, hidden_size=10, norm_layer=lambda n: kind(n, momentum=momentum))
    head.train()
    expected = copy.deepcopy(head.classifier)
    for step in range(3):
        x, target = features(device).requires_grad_(), hard_target(device)
        out = head(x, target) if guided else head(x)
        combine(out).backward()
        with torch.no_grad():
            bare = GGAMHead(C, 0, rd_channels=6, hidden_size=0).to(device, torch.float64)
            bare.load_state_dict(
                {k: v for k, v in head.state_dict().items() if not k.startswith("classifier")}
            )
            expected(bare(x))
        assert head.classifier[0].num_batches_tracked == step + 1
        for a, b in zip(head.classifier.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_nothing_is_stashed(device: torch.device) -> None:
    def state(module: nn.Module) -> dict[str, list[str]]:
        return {name: sorted(vars(m)) for name, m in module.named_modules()}

    def held(module: nn.Module) -> int:
        return sum(isinstance(v, Tensor) for m in module.modules() for v in vars(m).values())

    head, _ = pair(device=device, hidden_size=10)
    before = state(head), held(head), sorted(head.state_dict())
    head(features(device).requires_grad_(), hard_target(device))
    assert (state(head), held(head), sorted(head.state_dict())) == before


def test_hooks_on_the_classifier_run(device: torch.device) -> None:
    """A hooked layer has no closed form here: it is called as a module, and the results stay the same."""
    head, _ = pair(device=device, hidden_size=10)
    head.eval()
    x, target = features(device).requires_grad_(), hard_target(device)
    expected = head(x, target)
    hooks = {
        "classifier": lambda head, hook: head.classifier.register_forward_hook(hook),
        "before": lambda head, hook: head.classifier[1].register_forward_pre_hook(hook),
        "after": lambda head, hook: head.classifier[2].register_forward_hook(hook),
        "backward": lambda head, hook: head.classifier[4].register_full_backward_hook(hook),
    }
    for name, register in hooks.items():
        hooked, seen = copy.deepcopy(head), []  # type: ignore[var-annotated]
        register(hooked, lambda *_, seen=seen: seen.append(1))
        out = hooked(x, target)
        assert_parity(out, expected, 1e-10)
        out.logits.sum().backward()
        assert seen, name


def test_a_hook_on_the_classifier_leaves_dropout_where_it_was(device: torch.device) -> None:
    head = GGAMHead(C, K, hidden_size=10, drop_rate=0.5, device=device, dtype=torch.float64)
    x, seen = features(device), []  # type: ignore[var-annotated]

    def results() -> list[Tensor]:
        found = []
        for pre_logits in (True, False):
            torch.manual_seed(0)
            found.append(head(x, pre_logits=pre_logits))
        return found

    expected = results()
    head.classifier.register_forward_hook(lambda *_: seen.append(1))
    assert_close(results(), expected)
    assert seen == [1]
    assert len(head.classifier) == 5


def test_frozen_features_train_the_parameters(device: torch.device) -> None:
    for options in ({}, {"cam_detach": False}, {"build_classifier": pooled_classifier}):
        head, _ = pair(device=device, hidden_size=10, **options)
        x, target = features(device), hard_target(device)
        head.eval()
        leaf = x.clone().requires_grad_()
        expected = gradients(combine(head(leaf, target)), leaf, head)
        frozen = gradients(combine(head(x, target)), x, head)
        assert x.grad is None
        expected.pop("features")
        assert_parity(frozen, expected, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("cam_detach", [True, False])
def test_without_gradients(
    mode: Any, own: bool, cam_detach: bool, backend: str, device: torch.device
) -> None:
    head, _ = pair(
        device=device, backend=backend, hidden_size=10, cam_detach=cam_detach,
        build_classifier=pooled_classifier if own else None,
    )  # fmt: skip
    head, x, target = head.float().eval(), features(device).float(), hard_target(device)
    expected = head(x, target)
    with mode():
        out = head(x, target)
        logits = head(x)
    assert all(not t.requires_grad for t in out)
    assert_parity(out, expected, 1e-6)
    assert torch.equal(logits, out.logits)


@pytest.mark.parametrize("backend", BACKENDS)
@poolings(hidden_size=10)
def test_empty_batch(options: dict[str, Any], backend: str, device: torch.device) -> None:
    head, _ = pair(device=device, backend=backend, **options)
    head = head.float().train()
    x = features(device, n=0).float().requires_grad_()
    target = torch.zeros(0, dtype=torch.int64, device=device)
    out = head(x, target)
    assert [tuple(t.shape) for t in out] == [(0, K), (0, C), (0, H, W), (0, C), ()]
    assert out.guidance_loss == 0
    loss = GGAMLoss()(out, target)
    assert loss == 0
    loss.backward()
    assert x.grad is not None
    assert all(p.grad is None or not p.grad.count_nonzero() for p in head.parameters())
    for m in head.modules():
        if isinstance(m, nn.BatchNorm1d):
            assert m.num_batches_tracked == 0


def test_one_image_has_no_batch_statistics(device: torch.device) -> None:
    head, _ = pair(device=device, hidden_size=10)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        head.train()(features(device, n=1), hard_target(device, 1))
