"""Layers in the place of `fc1` and `fc2` that are more than a weight and a bias: called, not read."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from ggam_fast import GGAMHead, GGAMLoss, recorded
from ggam_fast.classifier.layers import read_directly
from ggam_fast.functional import fused_ggam_loss, guidance_loss
from tests.head.heads import POOLS
from tests.parity import (
    OPTIONS,
    C,
    K,
    assert_parity,
    combine,
    draws,
    features,
    gradients,
    hard_target,
    pair,
    relative_error,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")


class LoRA(nn.Module):
    """y = W x + b + B A dropout(x), of which W and b are frozen."""

    def __init__(self, linear: nn.Linear, rank: int = 2, p: float = 0.0) -> None:
        super().__init__()
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.linear, self.drop = linear.requires_grad_(False), nn.Dropout(p)
        self.down = nn.Linear(linear.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, linear.out_features, bias=False, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(self.drop(x)))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def doubled(linear: nn.Linear) -> nn.Module:
    other = Doubled(linear.in_features, linear.out_features).to(linear.weight)
    other.load_state_dict(linear.state_dict())
    return other


def without_bias(linear: nn.Linear) -> nn.Module:
    linear.bias = None  # type: ignore[assignment]
    return linear


def hooked(linear: nn.Linear) -> nn.Module:
    linear.register_forward_hook(lambda module, arguments, output: output * 1.5)
    return linear


WRAPPERS: dict[str, Any] = {
    "lora": LoRA,
    "forward": doubled,
    "hook": hooked,
    "no bias": without_bias,
    "weight_norm": weight_norm,
    "spectral_norm": lambda linear: spectral_norm(linear).eval(),
    "pruned": lambda linear: prune.random_unstructured(linear, "weight", 0.5),
    "pruned bias": lambda linear: prune.random_unstructured(linear, "bias", 0.5),
}


def wrap(head: Any, reference: Any, kind: str, layers: tuple[str, ...] = ("fc1", "fc2")) -> None:
    """The same wrapper around the layers of both heads."""
    for name in layers:
        torch.manual_seed(0)
        setattr(head, name, WRAPPERS[kind](getattr(head, name)))
        torch.manual_seed(0)
        setattr(reference, name, WRAPPERS[kind](getattr(reference, name)))
        assert not read_directly(getattr(head, name))


def check(head: nn.Module, reference: nn.Module, device: torch.device, tolerance: float = 1e-10) -> None:
    """Outputs and gradients of a guided step in both forms, and the logits of inference."""
    x, target = features(device).requires_grad_(), hard_target(device)
    with torch.random.fork_rng():
        found = head(x, target)
    expected = reference(x, target)
    assert_parity(found, expected, tolerance)
    assert_parity(gradients(combine(found), x, head), gradients(combine(expected), x, reference), tolerance)
    if not head.get_submodule("drop").p:
        torch.testing.assert_close(head(x), reference(x))
        loss = GGAMLoss(0.3)(reference(x, target), target)
        fused, _ = fused_ggam_loss(head, x, target, guidance_weight=0.3)
        assert relative_error(fused, loss) < tolerance
        wanted = gradients(loss, x, reference)
        assert_parity(gradients(fused, x, head), wanted, 10 * tolerance)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapped_layer_is_called(kind: str, device: torch.device) -> None:
    for layers in (("fc1",), ("fc2",), ("fc1", "fc2")):
        head, reference = pair(device=device, hidden_size=10)
        wrap(head, reference, kind, layers)
        check(head.eval(), reference.eval(), device)


@pytest.mark.parametrize("pool", POOLS)
def test_with_every_option(pool: str, device: torch.device) -> None:
    for options in draws({**OPTIONS, "attention": ("channel_spatial", "channel")}, 6, pool):
        options = {**options, **POOLS[pool], "drop_rate": 0.0}
        build = options.pop("build_classifier", None)
        head, reference = pair(device=device, hidden_size=10, **options, build_classifier=build)
        wrap(head, reference, "lora")
        check(head.eval(), reference.eval(), device)


def test_one_dropout_mask_serves_attention_and_grad_cam(device: torch.device) -> None:
    """beta's derivative of the MLP is that of the very forward that gave S."""
    head, reference = pair(device=device, hidden_size=0)
    for module in (head, reference):
        module.fc1 = LoRA(module.fc1, p=0.5)
    reference.load_state_dict(head.state_dict())
    x, target = features(device), hard_target(device)
    results = []
    for module in (head.train(), reference.train()):
        torch.manual_seed(1)
        results.append(module(x, target))
    assert_parity(*results, 1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any, device: torch.device) -> None:
    head, reference = pair(device=device, hidden_size=10)
    wrap(head, reference, "lora")
    x, target = features(device), hard_target(device)
    expected = reference.eval()(x, target)
    with mode():
        out = head.eval()(x, target)
    assert all(not o.requires_grad for o in out)
    assert_parity(out, expected, 1e-10)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_half_precision_features_and_layers(backend: str, device: torch.device) -> None:
    """The layers run in the type of their parameters, and the small tensors stay in float32."""
    head, _ = pair(device=device, dtype=torch.float32, backend=backend, hidden_size=0)
    head.fc1, head.fc2 = LoRA(head.fc1).bfloat16(), LoRA(head.fc2).bfloat16()
    x, target = features(device, torch.bfloat16), hard_target(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = head(x, target)
    assert {o.dtype for o in out} == {torch.float32}
    GGAMLoss()(out, target).backward()
    exact = copy.deepcopy(head).double()
    exact.backend = "torch"
    assert relative_error(out.cam_weights, exact(x.double(), target).cam_weights) < 0.02


def test_it_is_not_recorded(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = pair(device=device, dtype=torch.float32, backend="triton", hidden_size=0)
    x, target = features(device, torch.float32), hard_target(device)
    plain = head(x, target)
    monkeypatch.setattr(recorded, "remembered", lambda key: pytest.fail("a recording was looked up"))
    head.fc1 = nn.Sequential(head.fc1)  # type: ignore[assignment]
    assert_parity(head(x, target), plain, 1e-5)


def test_the_wrapper_goes_again(device: torch.device) -> None:
    """Pruning made permanent, and weight norm removed, leave a layer that is read."""
    head, _ = pair(device=device, hidden_size=0)
    x, target = features(device), hard_target(device)
    prune.random_unstructured(head.fc1, "weight", 0.5)
    weight_norm(head.fc2)
    called = head(x, target)
    prune.remove(head.fc1, "weight")
    torch.nn.utils.remove_weight_norm(head.fc2)
    assert read_directly(head.fc1)
    assert read_directly(head.fc2)
    assert_parity(head(x, target), called, 1e-10)


# Libraries


@pytest.mark.parametrize("on_classifier", [False, True])
def test_peft(on_classifier: bool, device: torch.device) -> None:
    peft = pytest.importorskip("peft")
    head, _ = pair(device=device, hidden_size=10)
    targets = ["fc1", "fc2", *(["classifier.1", "classifier.4"] if on_classifier else [])]
    x, target = features(device).requires_grad_(), hard_target(device)
    head.eval()
    plain = head(x, target)
    model = peft.get_peft_model(head, peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.0)).eval()
    assert_parity(model(x, target), plain, 1e-10)  # LoRA starts from zero

    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(targets)
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p) * 0.3)
    out = model(x, target)
    loss = GGAMLoss(0.3)(out, target)
    found = torch.autograd.grad(loss, [x, *trained])
    assert all(g.count_nonzero() for g in found)
    # The derivative along a direction, against a difference of losses; beta is a constant of the loss.
    direction = [torch.randn_like(p) for p in trained]

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(trained, direction, strict=True):
                p.add_(d, alpha=step)
            o = model(x, target)
            for p, d in zip(trained, direction, strict=True):
                p.sub_(d, alpha=step)
        return F.cross_entropy(o.logits, target) + 0.3 * guidance_loss(o.channel_attention, out.cam_weights)

    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    along = torch.stack([(g * d).sum() for g, d in zip(found[1:], direction, strict=True)]).sum()
    torch.testing.assert_close(along, slope, rtol=1e-5, atol=1e-8)

    # Merged into the weights, it is a plain head again.
    merged = model.merge_and_unload()
    assert read_directly(merged.fc1)
    assert_parity(merged(x, target), out, 1e-10)


def dequantized(head: nn.Module) -> nn.Module:
    """The head with the weights that its quantized layers stand for."""
    twin = copy.deepcopy(head)
    for path, layer in list(twin.named_modules()):
        weight = getattr(layer, "weight", None)
        weight = weight() if callable(weight) else weight
        if isinstance(weight, Tensor) and (weight.is_quantized or hasattr(weight, "__tensor_flatten__")):
            bias = layer.bias() if callable(layer.bias) else layer.bias
            plain = nn.Linear(weight.shape[1], weight.shape[0])
            with torch.no_grad():
                plain.weight.copy_(weight.dequantize())
                plain.bias.copy_(bias)
            parent, _, leaf = path.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, plain)
    return twin


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("whole", [False, True])
def test_torchao(config: str, whole: bool) -> None:
    """Weight-only layers have torchao's derivative, dynamic ones that of their dequantized weight."""
    quantization = pytest.importorskip("torchao.quantization")
    head, _ = pair(device=torch.device("cpu"), dtype=torch.float32, hidden_size=16)
    head.eval()

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and (whole or name.endswith(("fc1", "fc2")))

    quantization.quantize_(head, getattr(quantization, config)(), chosen)
    assert not read_directly(head.fc1)
    x, target = (
        features(torch.device("cpu"), torch.float32).requires_grad_(),
        hard_target(torch.device("cpu")),
    )
    out, expected = head(x, target), dequantized(head)(x, target)
    torch.testing.assert_close(head(x), out.logits)
    tolerance = 1e-5 if config == "Int8WeightOnlyConfig" else 0.05
    assert relative_error(out.logits, expected.logits) < tolerance
    assert relative_error(out.channel_attention, expected.channel_attention) < tolerance
    assert relative_error(out.cam_weights, expected.cam_weights) < tolerance
    (found,), (wanted,) = (torch.autograd.grad(GGAMLoss(0.3)(o, target), x) for o in (out, expected))
    assert relative_error(found, wanted) < tolerance


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("whole", [False, True])
def test_dynamic_quantization_of_torch(whole: bool) -> None:
    head, _ = pair(device=torch.device("cpu"), dtype=torch.float32, hidden_size=16)
    quantization = pytest.importorskip("torch.ao.quantization")
    quantized = quantization.quantize_dynamic(head.eval(), {nn.Linear} if whole else {"fc1", "fc2"})
    assert not isinstance(quantized.fc1, nn.Linear)
    assert isinstance(quantized.classifier[1], nn.Linear) != whole
    x, target = features(torch.device("cpu"), torch.float32), hard_target(torch.device("cpu"))
    out, expected = quantized(x, target), dequantized(quantized)(x, target)
    torch.testing.assert_close(quantized(x), out.logits)
    for name in ("logits", "channel_attention", "cam_weights"):
        assert relative_error(getattr(out, name), getattr(expected, name)) < 0.05


def test_a_layer_without_any_derivative_says_so() -> None:
    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach().round()

    head = GGAMHead(C, K, rd_channels=4)
    head.fc1 = Rounded(C, 4)
    x, target = features(torch.device("cpu"), torch.float32), hard_target(torch.device("cpu"))
    assert head(x).shape == (x.shape[0], K)
    head.fc2.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"fc1 or fc2 has no derivative.*call the head without target"):
        head(x, target)
    head.cam_at = "attended"
    assert head(x, target).cam_weights.shape == (x.shape[0], C)


def test_torch_func(device: torch.device) -> None:
    head, reference = pair(device=device, hidden_size=10)
    wrap(head, reference, "lora")
    x, target = features(device), hard_target(device)

    head.eval()
    found = torch.func.grad(lambda x: combine(head(x, target)))(x)
    torch.testing.assert_close(found, torch.func.grad(lambda x: combine(reference.eval()(x, target)))(x))
    tangent = torch.randn_like(x)
    _, slope = torch.func.jvp(head, (x,), (tangent,))
    _, expected = torch.func.jvp(reference.eval(), (x,), (tangent,))
    torch.testing.assert_close(slope, expected)
    with pytest.raises(NotImplementedError, match="a custom fc1 or fc2's Grad-CAM"):
        torch.func.jvp(lambda x: head(x, target).logits, (x,), (tangent,))


@pytest.mark.slow
def test_compiled(device: torch.device) -> None:
    head, reference = pair(device=device, hidden_size=10)
    wrap(head, reference, "lora")
    head.eval()
    reference.eval()
    x, target = features(device).requires_grad_(), hard_target(device)
    expected = reference(x, target)
    torch.testing.assert_close(torch.compile(head, fullgraph=True)(x), reference(x))
    for traced in (False, True):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(trace_autograd_ops=traced):
            out = torch.compile(head, fullgraph=traced)(x, target)
        assert_parity(out, expected, 1e-8)
        assert_parity(gradients(combine(out), x, head), gradients(combine(expected), x, reference), 1e-8)


def test_export(device: torch.device) -> None:
    head, reference = pair(device=device, hidden_size=10)
    wrap(head, reference, "lora")
    head.eval()
    x, target = features(device), hard_target(device)
    program = torch.export.export(head, (x,)).module()
    torch.testing.assert_close(program(x), head(x))
    with pytest.raises(RuntimeError, match="plain Linear layers as fc1 and fc2"):
        torch.export.export(head, (x, target))


def test_a_layer_of_another_width_is_an_error() -> None:
    head = GGAMHead(C, K, rd_channels=4)
    head.fc2 = nn.Sequential(nn.Linear(4, C + 1))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=rf"fc2 must give \(N, {C}\); got"):
        head(features(torch.device("cpu"), torch.float32))


def test_the_fused_loss_of_tokens_cuts_the_prefix_once(device: torch.device) -> None:
    head, reference = pair(device=device, hidden_size=0, input_fmt="NLC", prefix_tokens=2)
    wrap(head, reference, "lora")
    tokens = torch.rand(4, 12, C, dtype=torch.float64, device=device)
    target = hard_target(device, 4)
    loss, _ = fused_ggam_loss(head, tokens, target, guidance_weight=0.3)
    torch.testing.assert_close(loss, GGAMLoss(0.3)(reference(tokens, target), target))
