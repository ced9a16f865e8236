"""`explain` against the package grad-cam on the same layer, and its pictures."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ggam_fast
from ggam_fast import GGAMHead, explain
from ggam_fast.functional import fused_ggam_loss
from tests.parity import relative_error

timm = pytest.importorskip("timm")

K = 7
MODELS = {
    "test_resnet": ({}, "layer4"),
    "test_convnext": ({}, "stages.3"),
    "test_vit": ({"img_size": 48}, "norm"),
}


def build(name: str, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    given, _ = MODELS[name]
    model = ggam_fast.create_model(name, K, **given, hidden_size=16, rd_ratio=0.25, **options)
    for p in model.get_classifier().parameters():
        p.data += 0.3 * torch.randn_like(p)
    side = given.get("img_size", 64)
    images = torch.randn(3, 3, side, side)
    model(images)  # moves the running statistics off 0 and 1
    return model.eval(), images


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cam_at", ["features", "attended"])
@pytest.mark.parametrize("given", [True, False])
def test_equal_to_the_package_grad_cam(name: str, cam_at: str, given: bool) -> None:
    package = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model, images = build(name, cam_at=cam_at)
    target = torch.tensor([0, 3, 6]) if given else None
    found = explain(model, images, target)

    tokens = model.get_classifier().prefix_tokens

    def grid(x: Tensor) -> Tensor:
        side = round((x.shape[1] - tokens) ** 0.5)
        return x[:, tokens:].unflatten(1, (side, side)).permute(0, 3, 1, 2)

    layer = model.get_submodule(MODELS[name][1])
    with package.GradCAM(model, [layer], reshape_transform=grid if tokens else None) as theirs:
        chosen = None if target is None else [targets.ClassifierOutputTarget(int(k)) for k in target]
        heat = torch.from_numpy(theirs(images, chosen))
        weights = theirs.activations_and_grads.gradients[0].mean((2, 3))
    assert relative_error(found.cam_weights, weights) < 1e-4
    assert found.target.tolist() == (found.logits.argmax(1) if target is None else target).tolist()
    assert found.cam.count_nonzero()
    assert relative_error(found.heat("cam"), heat) < 2e-3  # they add 1e-7 to the largest value


def test_the_head_says_the_same() -> None:
    model, images = build("test_resnet")
    target, head = torch.tensor([0, 3, 6]), model.get_classifier()
    out = model(images, target)
    found = explain(model, images, target)
    for name in ("logits", "channel_attention", "spatial_attention", "cam_weights"):
        torch.testing.assert_close(getattr(found, name), getattr(out, name).detach())
    torch.testing.assert_close(found.cam, ggam_fast.cam(model.forward_features(images), out.cam_weights))
    assert not any(x.requires_grad for x in found)
    soft = explain(model, images, torch.eye(K)[target])
    torch.testing.assert_close(soft.cam_weights, found.cam_weights)
    assert (head.cam_at, head.cam_class, head.ignore_index) == ("features", "label", None)


def test_the_model_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes and statistics; and no backward pass and no hook."""
    model, images = build("test_resnet", ignore_index=2)
    model.train()
    model.layer1.eval()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    modes = [m.training for m in model.modules()]

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("hooked or differentiated")

    for owner, name in (
        (torch.autograd, "grad"), (torch.autograd, "backward"), (nn.Module, "register_forward_hook"),
        (nn.Module, "register_forward_pre_hook"), (nn.Module, "register_full_backward_hook"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    found = explain(model, images, torch.tensor([2, 2, 2]))  # an explained class is not ignored
    assert found.cam_weights.count_nonzero()
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_models_of_replace_head_and_wrappers() -> None:
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 5))
    model = ggam_fast.replace_head(own, 5, feature_layer="1", input_size=(3, 64, 64), rd_channels=4)
    images = torch.rand(2, 3, 64, 64)
    found = explain(model, images)
    assert found.cam.shape == (2, 16, 16)
    assert (found.pictures.amin((1, 2, 3)) == 0).all()
    assert (found.pictures.amax((1, 2, 3)) == 1).all()
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        again = explain(wrapped, images)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_a_head_that_peft_trains() -> None:
    """peft keeps the head beside a trained copy; the copy is what answers, and what is explained."""
    peft = pytest.importorskip("peft")
    model, images = build("test_vit")
    before = explain(model, images)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    tuned = peft.get_peft_model(model, config).eval()
    assert not isinstance(tuned.get_classifier(), GGAMHead)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    target = torch.tensor([0, 3, 6])
    out, found = tuned(images, target), explain(tuned, images, target)
    torch.testing.assert_close(found.logits, out.logits.detach())
    torch.testing.assert_close(found.cam_weights, out.cam_weights)
    loss, _ = fused_ggam_loss(tuned.get_classifier(), tuned.forward_features(images), target)
    torch.testing.assert_close(loss, ggam_fast.GGAMLoss()(out, target))
    with tuned.disable_adapter():
        again = explain(tuned, images)
    torch.testing.assert_close(again.logits, before.logits)


def test_pictures() -> None:
    model, _ = build("test_resnet")
    pictures = torch.rand(3, 3, 64, 48)
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    found = explain(model, (pictures - mean) / std)
    torch.testing.assert_close(found.pictures, pictures)
    assert found.cam.shape == found.spatial_attention.shape == (3, 2, 2)
    for name in ("cam", "spatial_attention"):
        heat, overlay = found.heat(name), found.overlay(name, 0.4)  # type: ignore[arg-type]
        assert heat.shape == (3, 64, 48)
        assert 0 <= heat.min() <= heat.max() <= 1
        assert overlay.shape == (3, 3, 64, 48)
        assert 0 <= overlay.min() <= overlay.max() <= 1
    torch.testing.assert_close(found.overlay("cam", 0), pictures)
    red, _, blue = found.overlay("cam", 1).unbind(1)
    high, low = found.heat() > 0.75, found.heat() < 0.25
    assert (red > blue)[high].all()
    assert (blue > red)[low].all()
    with pytest.raises(ValueError, match=r"map must be one of"):
        found.heat("beta")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]; got 2"):
        found.overlay("cam", 2)


def test_tokens_in_a_wide_grid_and_in_none() -> None:
    from ggam_fast.explain import _grid

    assert _grid(torch.zeros(2, 8), (32, 64)).shape == (2, 2, 4)
    assert _grid(torch.zeros(2, 7), (32, 64)).shape == (2, 7)
    model, images = build("test_vit")
    found = explain(model, images)._replace(cam=torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"cam must fill a grid"):
        found.overlay("cam")


def test_errors() -> None:
    model, images = build("test_resnet")
    for wrong in (nn.Linear(2, 2), timm.create_model("test_resnet"), GGAMHead(16, 3), 3):
        with pytest.raises(TypeError, match="create_model or replace_head"):
            explain(wrong, images)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images must be float \(N, C, H, W\); got torch.uint8"):
        explain(model, images.byte())
    with pytest.raises(ValueError, match=r"target must be in \[0, 7\)"):
        explain(model, images, torch.tensor([0, 3, 7]))
