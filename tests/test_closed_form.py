"""Grad-CAM in closed form: against autograd and against three published implementations."""

import captum.attr
import pytest
import torch
import torchcam.methods
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

import ggam_fast
from ggam_fast.reference import GGAMHeadReference
from tests.parity import OPTIONS, C, H, K, N, W, features, hard_target, pair, relative_error, soft_target

POOLS = {
    "avg": {"pool_type": "avg"},
    "max": {"pool_type": "max"},
    "flatten": {"pool_type": "flatten", "feat_size": (H, W)},
}


@pytest.mark.parametrize("pool_type", POOLS)
@pytest.mark.parametrize("attention", OPTIONS["attention"])
@pytest.mark.parametrize("scale", OPTIONS["attention_scale"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_beta_is_the_mean_of_autograds_gradient(
    pool_type: str, attention: str, scale: str, training: bool, soft: bool, device: torch.device
) -> None:
    """beta against autograd through the head itself, in training mode with the batch's coupling."""
    head, _ = pair(
        device=device, hidden_size=10, attention=attention, attention_scale=scale, **POOLS[pool_type]
    )
    head.train(training)
    x = features(device).requires_grad_()
    target = soft_target(device) if soft else hard_target(device)
    out = head(x, target)
    weights = target if soft else nn.functional.one_hot(target, K)
    (gradient,) = torch.autograd.grad((out.logits * weights).sum(), x)
    assert relative_error(out.cam_weights, gradient.mean((2, 3))) < 1e-10


@pytest.mark.parametrize("cam_at", OPTIONS["cam_at"])
@pytest.mark.parametrize(("scale", "kappa"), [("printed", 1), ("unit_mean", H * W)])
def test_beta_of_a_linear_classifier_written_out(
    scale: str, kappa: int, cam_at: str, device: torch.device
) -> None:
    """Average pooling and one linear layer, the formulas of the paper's Grad-CAM by hand."""
    head, _ = pair(device=device, hidden_size=0, cam_at=cam_at, attention_scale=scale)
    x, target = features(device), hard_target(device)
    out = head(x, target)
    positions = H * W
    v = head.classifier.weight[target]
    a, t, s = x.flatten(2), out.spatial_attention.flatten(1), out.channel_attention
    if cam_at == "attended":
        beta = v / positions
    else:
        dt = kappa * torch.einsum("ncl,nc->nl", a, v) / positions
        du = t * (dt - (dt * t).sum(1, keepdim=True))
        ds = torch.einsum("ncl,nl->nc", a, du)
        de = s * (ds - (ds * s).sum(1, keepdim=True))
        alive = a.mean(2) @ head.fc1.weight.T + head.fc1.bias > 0
        dg = (de @ head.fc2.weight * alive) @ head.fc1.weight
        beta = (kappa * v / positions + dg) / positions
    assert relative_error(out.cam_weights, beta) < 1e-10


class TinyNet(nn.Module):
    """A convolution whose output is the head's features."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.ReLU())
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


@pytest.fixture(params=list(POOLS))
def net(request: pytest.FixtureRequest, device: torch.device) -> TinyNet:
    head, _ = pair(device=device, hidden_size=10, **POOLS[request.param])
    return TinyNet(head).to(device, torch.float64).eval()


@pytest.fixture
def images(device: torch.device) -> Tensor:
    return torch.randn(N, 3, H, W, dtype=torch.float64, device=device)


def test_agrees_with_pytorch_grad_cam(net: TinyNet, images: Tensor, device: torch.device) -> None:
    target = hard_target(device)
    maps = net.backbone(images)
    out = net.head(maps, target)
    with GradCAM(model=net, target_layers=[net.backbone]) as theirs:
        theirs(input_tensor=images, targets=[ClassifierOutputTarget(int(k)) for k in target])
        activations, gradients = (
            store[0]
            for store in (theirs.activations_and_grads.activations, theirs.activations_and_grads.gradients)
        )
        weights = theirs.get_cam_weights(
            images, net.backbone, None, activations.cpu().numpy(), gradients.cpu().numpy()
        )
    assert relative_error(out.cam_weights.cpu(), torch.from_numpy(weights)) < 1e-10


def test_agrees_with_captum(net: TinyNet, images: Tensor, device: torch.device) -> None:
    target = hard_target(device)
    maps = net.backbone(images)
    out = net.head(maps, target)
    expected = captum.attr.LayerGradCam(net, net.backbone).attribute(
        images, target=target, relu_attributions=True
    )
    found = ggam_fast.cam(maps, out.cam_weights)
    assert relative_error(found, expected.squeeze(1)) < 1e-10
    assert found.count_nonzero() > 0


def test_agrees_with_torchcam(net: TinyNet, images: Tensor, device: torch.device) -> None:
    target = hard_target(device)
    maps = net.backbone(images)
    out = net.head(maps, target)
    with torchcam.methods.GradCAM(net, target_layer="backbone") as extractor:
        scores = net(images.requires_grad_())
        expected = extractor(target.tolist(), scores, normalized=False)[0]
    assert relative_error(ggam_fast.cam(maps, out.cam_weights), expected) < 1e-10


@pytest.mark.parametrize("input_fmt", ["NCHW", "NHWC", "NLC"])
def test_cam(input_fmt: str, device: torch.device) -> None:
    x = features(device)
    weights = torch.randn(N, C, dtype=torch.float64, device=device)
    expected = torch.einsum("nchw,nc->nhw", x, weights).clamp_min(0)
    given = {"NCHW": x, "NHWC": x.permute(0, 2, 3, 1), "NLC": x.flatten(2).transpose(1, 2)}[input_fmt]
    found = ggam_fast.cam(given, weights, input_fmt=input_fmt)
    assert found.shape == ((N, H * W) if input_fmt == "NLC" else (N, H, W))
    assert relative_error(found.reshape(N, H, W), expected) < 1e-10
    assert (found >= 0).all()


def test_raw_beta_is_tiny_with_a_fresh_head(device: torch.device) -> None:
    """Why "standardized" exists: sigmoid(beta) of a fresh head is 0.5 for every channel."""
    head = GGAMHeadReference(256, 10, hidden_size=0, attention_scale="printed").to(device)
    out = head(torch.rand(2, 256, 7, 7, device=device), torch.tensor([1, 2], device=device))
    assert (out.cam_weights.sigmoid() - 0.5).abs().max() < 1e-3
