"""Replayed steps have the bits of the closed form, and only for the key of their recording.  A step that
cannot be recorded runs unrecorded."""

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ggam_fast import GGAMHead, GGAMLoss, GGAMOutput, checks
from tests import parity
from tests.parity import C, K, N, as_format, hard_target, relative_error

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

import triton

from ggam_fast import recorded, step
from ggam_fast.backends.registry import get_backend
from ggam_fast.backends.triton import launch as launching
from ggam_fast.backends.triton import record
from ggam_fast.classifier.layers import known_layers
from ggam_fast.closed_form import held_features_grad, held_layer_grads
from ggam_fast.functional import fused_ggam_loss
from ggam_fast.norm import SettlingBatchNorm1d

FORMS = ("fused", "guided", "logits")
GUIDED = ("fused", "guided")
SCALE, OF_GUIDANCE = 3.0, 2.0  # the gradients that arrive at the loss, and at the guidance loss
Result = dict[str, Tensor]
every_form = pytest.mark.parametrize("form", FORMS)
guided_forms = pytest.mark.parametrize("form", GUIDED)


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """What is recorded, from nothing on."""
    monkeypatch.setattr(recorded, "_recordings", {})
    monkeypatch.setattr(recorded, "enabled", True)
    return recorded._recordings


def make(device: torch.device, **options: Any) -> GGAMHead:
    options = {"hidden_size": 8, "dtype": torch.float32, **options}
    return parity.pair(device=device, backend="triton", **options)[0]


def data(device: torch.device, n: int = 3) -> tuple[Tensor, Tensor]:
    return parity.features(device, torch.float32, n=n).requires_grad_(), hard_target(device, n)


def forward(
    form: str, head: Any, x: Tensor, target: Tensor, weight: float = 0.7, smoothing: float = 0.1
) -> Result:
    """The outputs by name."""
    if form == "logits":
        return {"logits": head(x)}
    if form == "guided":
        return head(x, target)._asdict()
    if isinstance(head, GGAMHead):
        loss, out = fused_ggam_loss(head, x, target, guidance_weight=weight, label_smoothing=smoothing)
        return {"loss": loss, **out._asdict()}
    out = head(x, target)
    loss = GGAMLoss(weight, smoothing, head.ignore_index)(out, target)
    return {"loss": loss, **{name: y.detach() for name, y in out._asdict().items()}}


def seeds(found: Result) -> dict[str, Tensor]:
    """The gradient that arrives at each output."""
    logits = found["logits"]
    of_logits = torch.linspace(-1.0, 1.0, logits.numel(), device=logits.device).view(logits.shape)
    chosen = {
        "loss": torch.tensor(SCALE), "logits": of_logits, "guidance_loss": torch.tensor(OF_GUIDANCE),
    }  # fmt: skip
    return {k: v.to(found[k]) for k, v in chosen.items() if k in found and found[k].requires_grad}


def pull(found: Result, head: nn.Module, x: Tensor, **options: Any) -> Result:
    """The gradients of the features and the parameters, by name."""
    inputs = {"features": x, **dict(head.named_parameters())}
    inputs = {name: p for name, p in inputs.items() if p.requires_grad}
    dys = seeds(found)
    if not inputs or not dys:
        return {}
    grads = torch.autograd.grad(
        [found[name] for name in dys], list(inputs.values()), list(dys.values()),
        allow_unused=True, materialize_grads=True, **options,
    )  # fmt: skip
    return dict(zip(inputs, grads, strict=True))


def run(form: str, head: Any, x: Tensor, target: Tensor, *numbers: float) -> Result:
    """Outputs, gradients, and the buffers afterwards."""
    found = forward(form, head, x, target, *numbers)
    grads = pull(found, head, x)
    buffers = {name: b.clone() for name, b in head.named_buffers()}
    return {**{name: y.detach() for name, y in found.items()}, **grads, **buffers}


def unrecorded(form: str, head: Any, x: Tensor, target: Tensor, *numbers: float) -> Result:
    """The same on a copy of the head, without recordings."""
    recorded.enabled = False
    try:
        return run(form, copy.deepcopy(head), x, target, *numbers)
    finally:
        recorded.enabled = True


def direct(form: str, head: GGAMHead, x: Tensor, target: Tensor, *numbers: float) -> Result:
    """The closed form on the tensors themselves, its launches launched."""
    a, shape, mlp, options, backend = head._inputs(x.detach())
    layers = known_layers(head.classifier, head.drop)
    assert layers is not None
    terms, stages = head._loss_terms(*(numbers or (0.7, 0.1))), get_backend(backend)
    with torch.no_grad():
        if form == "fused":
            out, guided, held, _ = step.fused_forward(stages, a, mlp, options, layers, target, terms)
            found = {"loss": guided.loss, **out._asdict()}
            scale = torch.tensor(SCALE, device=x.device)
            da = held_features_grad(stages, a, options, held, scale)
            pairs = held_layer_grads(stages, held, scale)
        else:
            asked = form == "guided"
            out, seen = step.drop_in_forward(
                stages, a, mlp, options, layers, target if asked else None, terms if asked else None
            )
            found = out._asdict() if asked else {"logits": out.logits}
            at = seeds({"logits": out.logits.clone().requires_grad_()})["logits"]
            of_guidance = torch.tensor(OF_GUIDANCE, device=x.device) if asked else None
            held = step.drop_in_factors(stages, a, mlp, options, seen, at, of_guidance)
            da = held_features_grad(stages, a, options, held)
            pairs = held_layer_grads(stages, held)
        parameters = [(layer.weight, layer.bias) for layer in held.layers]
    if "spatial_attention" in found:
        found["spatial_attention"] = found["spatial_attention"].view(-1, *shape)
    names = {id(p): name for name, p in head.named_parameters()}
    for ps, gs in zip(parameters, pairs, strict=True):
        found |= {names[id(p)]: g for p, g in zip(ps, gs, strict=True) if p is not None}
    found["features"] = checks.like_input(da, shape, head.input_fmt)
    return found | dict(head.named_buffers())


def assert_same(found: Result, expected: Result, tolerance: float = 1e-5) -> None:
    """0: bit for bit."""
    assert found.keys() == expected.keys()
    if tolerance:
        exact = {name: value.float() for name, value in expected.items()}
        half = found["features"].dtype if "features" in found else None
        if half not in (None, torch.float32):
            assert relative_error(found["features"], exact.pop("features")) < 2**-7
            found = {name: value for name, value in found.items() if name != "features"}
        parity.assert_parity(found, exact, tolerance)
        return
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value.nan_to_num(7.0), expected[name].nan_to_num(7.0)), name


def made(recordings: dict[Any, Any]) -> int:
    """How many recordings there are."""
    return sum(r is not None for r in recordings.values())


# ---- the same numbers

PARITY = {
    **{k: v for k, v in parity.OPTIONS.items() if k not in ("cam_detach", "drop_rate")},
    "hidden_size": (8, 0),
    "norm_layer": (SettlingBatchNorm1d, nn.BatchNorm1d),
    "act_layer": (nn.ELU, nn.ReLU),
    "form": (*FORMS, "fused"),
    "layout": ("nchw", "channels_last", "NHWC", "NLC"),
    "half": (False, True),
    "target": ("hard", "soft", "ignored"),
    "training": (True, False),
    "smoothing": (0.0, 0.2),
}


def drawn_target(kind: str, device: torch.device) -> Tensor:
    if kind == "soft":
        return torch.rand(N, K).to(device)  # which do not sum to one
    target = hard_target(device)
    if kind == "ignored":
        target[1] = -100
    return target


@pytest.mark.parametrize("options", list(parity.draws(PARITY, 24, "recorded")), ids=str)
def test_replayed_numbers(options: dict[str, Any], device: torch.device, recordings: dict[Any, Any]) -> None:
    """Against the closed form itself, bit for bit, the unrecorded path, the eager reference in float64."""
    options = dict(options)
    form, layout, kind, smoothing = (options.pop(k) for k in ("form", "layout", "target", "smoothing"))
    dtype = torch.bfloat16 if options.pop("half") else torch.float32
    training = options.pop("training")
    fmt = layout if layout in checks.INPUT_FMT else "NCHW"
    if kind == "ignored":
        options["ignore_index"] = -100
    head, reference = parity.pair(
        device=device, dtype=torch.float32, backend="triton", input_fmt=fmt, **options
    )
    twin, reference = copy.deepcopy(head).train(training), reference.double().train(training)
    head.train(training)
    for replay in range(2):
        memory = "channels_last" if layout == "channels_last" else "nchw"
        x = as_format(parity.features(device, dtype, memory), fmt).detach()
        x = (x.contiguous() if fmt != "NCHW" else x).requires_grad_()
        target = drawn_target(kind, device)
        without = unrecorded(form, head, x, target, 0.7, smoothing) if replay else None
        found = run(form, head, x, target, 0.7, smoothing)
        assert_same(found, direct(form, twin, x, target, 0.7, smoothing), 0)
        if kind != "ignored" or form == "logits":  # the reference ignores nothing
            exact = run(form, reference, x.detach().double().requires_grad_(), target, 0.7, smoothing)
            assert_same(found, exact, 1e-4)
        if without is not None:
            assert_same(found, without, 1e-5)
        tracked = [m.num_batches_tracked for m in head.modules() if isinstance(m, nn.BatchNorm1d)]
        assert all(int(t) == (replay + 1) * training for t in tracked)
        assert made(recordings) == 1
        assert len(recordings) == 1


@every_form
@pytest.mark.parametrize("frozen", ["features", "head", "half of the head"])
def test_what_needs_no_gradient(form: str, frozen: str, device: torch.device) -> None:
    head, (x, target) = make(device), data(device)
    if frozen == "features":
        x = x.detach()
    for i, p in enumerate(head.parameters()):
        p.requires_grad_(frozen == "features" or (frozen != "head" and i % 2 == 0))
    expected = unrecorded(form, head, x, target)
    assert_same(run(form, head, x, target), expected)


# ---- the key: what changes it


def offset(x: Tensor, bytes_: int = 8) -> Tensor:
    """The same, so many bytes behind an aligned address."""
    gap = bytes_ // x.element_size()
    out = x.new_empty(x.numel() + gap)[gap:].view(x.shape).copy_(x)
    assert out.data_ptr() % 16 == bytes_
    return out


def realign_parameter(s: Any) -> None:
    s.head.fc1.weight = nn.Parameter(offset(s.head.fc1.weight.detach()))


def realign_buffer(s: Any) -> None:
    s.head.classifier[0].running_mean = offset(s.head.classifier[0].running_mean)


def nhwc(s: Any) -> None:
    s.head.input_fmt, s.x = "NHWC", s.x.detach().permute(0, 2, 3, 1).contiguous().requires_grad_()


def put(name: str, value: object) -> Callable[[Any], None]:
    """Set an option of the head, or of one of its layers."""

    def change(s: Any) -> None:
        *path, last = name.split(".")
        setattr(s.head.get_submodule(".".join(path)), last, value)

    return change


def leaf(of: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """Other features."""
    return lambda s: setattr(s, "x", of(s.x.detach()).requires_grad_())


def other(**changes: Any) -> Callable[[Any], None]:
    return lambda s: vars(s).update({k: v(s) for k, v in changes.items()})


KEYS: dict[str, Callable[[Any], object]] = {
    "batch": other(x=lambda s: s.x.detach()[:2].requires_grad_(), target=lambda s: s.target[:2]),
    "positions": leaf(lambda x: x[:, :, :2].contiguous()),
    "strides": leaf(lambda x: x.contiguous(memory_format=torch.channels_last)),
    "type": leaf(lambda x: x.bfloat16()),
    "alignment of the features": leaf(offset),
    "alignment of the target": other(target=lambda s: offset(s.target)),
    "alignment of a parameter": realign_parameter,
    "alignment of a buffer": realign_buffer,
    "kind of target": other(target=lambda s: torch.rand(3, K).to(s.target.device)),
    "features without gradient": other(x=lambda s: s.x.detach()),
    "gradient of a weight": lambda s: s.head.classifier[1].weight.requires_grad_(False),
    "attention": put("attention", "spatial"),
    "spatial_norm": put("spatial_norm", "sum"),
    "attention_scale": put("attention_scale", "printed"),
    "cam_at": put("cam_at", "attended"),
    "cam_class": put("cam_class", "predicted"),
    "cam_norm": put("cam_norm", "standardized"),
    "divergence": put("divergence", "forward"),
    "guidance_reduction": put("guidance_reduction", "sum"),
    "ignore_index": put("ignore_index", -100),
    "input_fmt": nhwc,
    "evaluation": lambda s: s.head.eval(),
    "evaluation of a layer": lambda s: s.head.classifier[0].eval(),
    "momentum": put("classifier.0.momentum", 0.3),
    "cumulative momentum": put("classifier.2.momentum", None),
    "eps": put("classifier.2.eps", 0.1),
    "no running statistics": put("classifier.0.track_running_stats", False),
    "alpha": put("classifier.3.alpha", 0.5),
    "another activation": put("classifier.3", nn.ReLU()),
    "another norm": lambda s: put("classifier.0", nn.BatchNorm1d(C).to(s.x.device))(s),
    "Triton's debug": lambda s: s.monkeypatch.setattr(triton.knobs.runtime, "debug", True),
}


@pytest.mark.parametrize("entry", KEYS)
def test_another_key_is_another_recording(
    entry: str, device: torch.device, recordings: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMS[list(KEYS).index(entry) % 2]
    s = SimpleNamespace(head=make(device), monkeypatch=monkeypatch)
    s.x, s.target = data(device)
    forward(form, s.head, s.x, s.target)
    assert made(recordings) == len(recordings) == 1
    KEYS[entry](s)
    expected = unrecorded(form, s.head, s.x, s.target)
    found = run(form, s.head, s.x, s.target)
    assert made(recordings) == len(recordings) == 2
    assert_same(found, expected)


def test_the_strides_of_features_with_gaps(device: torch.device, recordings: dict[Any, Any]) -> None:
    head, (x, target) = make(device).eval(), data(device)
    for times in (2, 3):
        part = torch.cat([x.detach()] * times, 1)[:, :C].requires_grad_()
        assert_same(run("guided", head, part, target), unrecorded("guided", head, part, target))
        assert made(recordings) == times - 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("form", ["guided", "logits"])
def test_the_mode_is_in_the_key(
    form: str, mode: Any, device: torch.device, recordings: dict[Any, Any]
) -> None:
    head, (x, target) = make(device).eval(), data(device)
    expected = run(form, head, x, target)
    for _ in range(2):
        with mode():
            found = run(form, head, x, target)
        assert made(recordings) == 2
        assert not any(y.requires_grad for y in found.values())
        assert_same(found, {name: expected[name] for name in found})
    assert_same(run(form, head, x, target), expected, 0)
    assert made(recordings) == 2


def test_the_key_holds_each_need_of_a_gradient(device: torch.device) -> None:
    head, (x, target) = make(device), data(device)
    keys = set()
    for p in [None, x, *head.parameters()]:
        if p is not None:
            p.requires_grad_(False)
        call = recorded._call("fused", head, x, target)
        assert call is not None
        keys.add(call.key)
        if p is not None:
            p.requires_grad_(True)
    assert len(keys) == 2 + len(list(head.parameters()))


def test_what_changes_every_step_is_not_in_the_key(device: torch.device, recordings: dict[Any, Any]) -> None:
    head, (x, target) = make(device), data(device)
    for form, count in (("fused", 1), ("guided", 2)):
        for weight, smoothing, temperature in ((1, 0, 1), (0.3, 0.2, 4)):
            head.cam_temperature = temperature
            expected = unrecorded(form, head, x, target, weight, smoothing)
            assert_same(run(form, head, x, target, weight, smoothing), expected)
            assert made(recordings) == len(recordings) == count


@pytest.mark.parametrize(
    "change", ["in place", "data", "parameter", "assign", "strides of data", "device and back"]
)
@pytest.mark.parametrize("form", ["fused", "logits"])
def test_new_memory_is_read(form: str, change: str, device: torch.device, recordings: dict[Any, Any]) -> None:
    head, (x, target) = make(device), data(device)
    forward(form, head, x, target)
    weight = head.classifier[1].weight
    if change == "in place":
        with torch.no_grad():
            weight.mul_(-2.0)
    elif change == "data":
        weight.data = weight.data * -2.0
    elif change == "parameter":
        head.classifier[1].weight = nn.Parameter(weight.detach() * -2.0)
    elif change == "assign":
        state = {name: value * 2 for name, value in head.state_dict().items() if name != "unit_mean"}
        head.load_state_dict(state | {"unit_mean": torch.tensor(True)}, assign=True)
    elif change == "strides of data":
        weight.data = (weight.data * -2.0).t().contiguous().t()
    else:
        head.double().to(torch.float32)
    expected = unrecorded(form, head, x, target)
    assert_same(run(form, head, x, target), expected)
    assert made(recordings) == 1
    assert len(recordings) == 1 + (change == "strides of data")


@every_form
def test_data_of_another_shape_is_refused(form: str, device: torch.device) -> None:
    head, (x, target) = make(device), data(device)
    run(form, head, x, target)
    head.classifier[1].weight.data = torch.randn(8, C + 1, device=device)
    for go in (unrecorded, run):
        with pytest.raises(RuntimeError, match=f"a layer takes {C + 1} features; got {C}"):
            go(form, head, x, target)


@guided_forms
def test_a_classifier_of_other_classes_is_refused(form: str, device: torch.device) -> None:
    head, (x, target) = make(device, hidden_size=0), data(device)
    head.classifier = nn.Linear(C, K + 2).to(device)
    for go in (unrecorded, run, run):
        with pytest.raises(ValueError, match=r"classifier must return scores \(N, num_classes\)"):
            go(form, head, x, target)


def test_hooks_and_afterwards(device: torch.device, recordings: dict[Any, Any]) -> None:
    head, (x, target) = make(device), data(device)
    seen: list[str] = []
    for at in ("classifier", "classifier.1", "classifier.4"):
        run("fused", head, x, target)
        assert made(recordings) == 1
        handle = head.get_submodule(at).register_forward_hook(lambda *_, at=at: seen.append(at))
        expected = unrecorded("fused", head, x, target)
        assert seen[-1] == at
        count = len(seen)
        assert_same(run("fused", head, x, target), expected, 0)
        assert len(seen) == count + 1
        handle.remove()
    assert made(recordings) == len(recordings) == 1


# ---- what has no recording


class OwnHead(GGAMHead):
    def _loss_terms(self, *arguments: Any) -> Any:
        return super()._loss_terms(*arguments)._replace(cam_temperature=3.0)


class Untouched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def tied(device: torch.device) -> GGAMHead:
    shared = nn.Linear(C, C)
    return make(device, build_classifier=lambda: nn.Sequential(shared, nn.ELU(), shared, nn.Linear(C, K)))


def hooked(device: torch.device, at: str) -> GGAMHead:
    head = make(device)
    head.get_submodule(at).register_forward_hook(lambda module, inputs, output: output * 2)
    return head


def subclassed(device: torch.device) -> GGAMHead:
    head = make(device)
    own = OwnHead(C, K, rd_channels=6, hidden_size=8, backend="triton").to(device)
    own.load_state_dict(head.state_dict())
    return own


def with_extra_parameter(device: torch.device) -> GGAMHead:
    head = make(device)
    head.classifier[1].register_parameter("extra", nn.Parameter(torch.zeros(1, device=device)))
    return head


def linear(device: torch.device) -> GGAMHead:
    return make(device, hidden_size=0)


def map_classifier() -> nn.Module:
    return nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(C, K))


UNRECORDED: dict[str, Callable[[torch.device], GGAMHead]] = {
    "custom classifier": lambda d: make(
        d, build_classifier=lambda: nn.Sequential(nn.Linear(C, 9), nn.Tanh(), nn.Linear(9, K))
    ),
    "hook on the classifier": lambda d: hooked(d, "classifier"),
    "hook on a layer": lambda d: hooked(d, "classifier.1"),
    "SyncBatchNorm": lambda d: make(d, norm_layer=nn.SyncBatchNorm).eval(),
    "dropout": lambda d: make(d, drop_rate=0.4),
    "dropout in the classifier": lambda d: make(
        d, build_classifier=lambda: nn.Sequential(nn.Dropout(0.4), nn.Linear(C, K))
    ),
    "gradients through beta": lambda d: make(d, cam_detach=False, hidden_size=0),
    "maximum": lambda d: make(d, pool_type="max", hidden_size=0),
    "flatten": lambda d: make(d, pool_type="flatten", feat_size=(parity.H, parity.W), hidden_size=0),
    "map": lambda d: make(d, pool_type="", build_classifier=map_classifier),
    "bfloat16 parameters": lambda d: make(d, dtype=torch.bfloat16, hidden_size=0),
    "tied parameters": tied,
    "subclass": subclassed,
    "a parameter more": with_extra_parameter,
    "a parameter less": lambda d: make(d, norm_layer=lambda n, **o: nn.BatchNorm1d(n, affine=False, **o)),
    "HIP": linear,
    "dispatch mode": linear,
    "features of float64": lambda d: make(d, dtype=torch.float64, hidden_size=0),
    "soft target of float64": linear,
    "features without a dense dimension": linear,
    "no images": make,
    "one image": make,
}


def test_guidance_of_each_image_is_not_recorded(device: torch.device, recordings: dict[Any, Any]) -> None:
    head, (x, target) = make(device, guidance_reduction="none"), data(device)
    for _ in range(2):
        GGAMLoss(0.5, reduction="none")(head(x, target), target).sum().backward()
        fused_ggam_loss(head, x, target)[0].backward()
    assert made(recordings) == 0


@pytest.mark.parametrize("case", UNRECORDED)
def test_what_is_not_recorded(
    case: str,
    device: torch.device,
    recordings: dict[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    head, (x, target) = UNRECORDED[case](device), data(device)
    mode: AbstractContextManager[object] = nullcontext()
    if case == "HIP":
        if device.type == "cuda":
            pytest.skip("kernels would be launched as on AMD")
        monkeypatch.setattr(torch.version, "hip", "6.0")
    elif case == "dispatch mode":
        mode = Untouched()
    elif case == "features of float64":
        head.backend, x = "torch", x.detach().double().requires_grad_()
    elif case == "soft target of float64":
        target = parity.soft_target(device, 3)
    elif case == "features without a dense dimension":
        x = torch.rand(3, C, 3, 10, device=device)[..., ::2].requires_grad_()
    elif case in ("no images", "one image"):
        n = int(case == "one image")
        if n == 0:
            request.getfixturevalue("poisoned_outputs")
        x, target = x.detach()[:n].requires_grad_(), target[:n]
    results: list[Any] = []
    for form in FORMS:
        with mode:
            for go in (unrecorded, run):
                torch.manual_seed(3)  # for a dropout's mask
                twin = copy.deepcopy(head)
                try:
                    results.append(go(form, twin, x, target))
                except ValueError as error:
                    results.append(str(error))
        expected, found = results[-2:]
        if case == "one image":
            assert found == expected
            assert "Expected more than 1 value per channel when training" in found
        else:
            assert_same(found, expected, 1e-5)
    if case == "soft target of float64":  # without a target there is nothing against it
        recordings = {key: value for key, value in recordings.items() if key[0] != "logits"}
    assert made(recordings) == 0


@every_form
def test_functorch_is_not_recorded(form: str, device: torch.device, recordings: dict[Any, Any]) -> None:
    head, (x, target) = make(device).eval(), data(device)
    if form == "fused":
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            torch.func.grad(lambda a: fused_ggam_loss(head, a, target).loss)(x.detach())
        assert made(recordings) == 0
        return

    def total(a: Tensor) -> Tensor:
        return sum((y.square().sum() for y in forward(form, head, a, target).values()), torch.zeros(()))

    found = torch.func.grad(total)(x.detach())
    both = torch.func.vmap(head)(x.detach().unsqueeze(0).expand(2, *x.shape))
    assert made(recordings) == 0
    recorded.enabled = False
    assert relative_error(found, torch.func.grad(total)(x.detach())) < 1e-6
    assert relative_error(both[1], head(x.detach())) < 1e-6


@every_form
def test_forward_mode_is_not_recorded(form: str, device: torch.device, recordings: dict[Any, Any]) -> None:
    head, (x, target) = make(device).eval().requires_grad_(False), data(device)
    x = x.detach()
    run(form, head, x.requires_grad_(), target)
    before, tangent = made(recordings), torch.randn_like(x)
    name = "loss" if form == "fused" else "logits"
    (gradient,) = torch.autograd.grad(forward(form, head, x, target)[name].sum(), x)
    with forward_ad.dual_level():
        y = forward(form, head, forward_ad.make_dual(x.detach(), tangent), target)[name]
        found = forward_ad.unpack_dual(y).tangent
    assert made(recordings) == before
    torch.testing.assert_close(found.sum(), (gradient * tangent).sum(), rtol=1e-4, atol=1e-6)


def test_a_subclass_of_tensor_is_not_recorded(device: torch.device, recordings: dict[Any, Any]) -> None:
    class Own(Tensor):
        pass

    head, (x, target) = make(device).eval(), data(device)
    expected = unrecorded("logits", head, x, target)["logits"]
    found = head(x.detach().as_subclass(Own)).as_subclass(Tensor)
    assert made(recordings) == 0
    assert relative_error(found, expected) < 1e-6


# ---- behaviour


def test_recordings_are_bounded(
    device: torch.device, recordings: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "_MOST", 2)
    head, (x, target) = make(device, hidden_size=0).eval(), data(device)
    expected = unrecorded("logits", head, x, target)
    for n in (1, 2, 3, 3, 1):
        part = x.detach()[:n].requires_grad_()
        found = run("logits", head, part, target[:n])["logits"]
        assert len(recordings) <= 2
        assert relative_error(found, expected["logits"][:n]) < 1e-6


@every_form
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_forwards_before_backwards(form: str, order: tuple[int, int], device: torch.device) -> None:
    head = make(device)
    inputs = [data(device) for _ in range(2)]
    expected = [run(form, copy.deepcopy(head), *each) for each in inputs]
    outs = [forward(form, head, *each) for each in inputs]
    for i in order:
        found = pull(outs[i], head, inputs[i][0])
        assert_same(found, {name: expected[i][name] for name in found}, 0)


@every_form
def test_backward_again(form: str, device: torch.device) -> None:
    head, (x, target) = make(device), data(device)
    run(form, head, x, target)
    found = forward(form, head, x, target)
    first = pull(found, head, x, retain_graph=True)
    torch.empty(1 << 16, device=device).fill_(float("nan"))
    assert_same(pull(found, head, x), first, 0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        pull(found, head, x)


@every_form
def test_a_batch_of_gradients(form: str, device: torch.device) -> None:
    head, (x, target) = make(device).eval(), data(device)
    found = forward(form, head, x, target)
    y, dy = next((found[name], seed) for name, seed in seeds(found).items())
    wanted = [x, *head.parameters()]
    (single,) = ([g * 3 for g in torch.autograd.grad(y, wanted, dy, retain_graph=True)],)
    batch = torch.autograd.grad(y, wanted, torch.stack([dy, 3 * dy]), is_grads_batched=True)
    for got, want in zip(batch, single, strict=True):
        assert got.shape == (2, *want.shape)
        assert float((got[1] - want).norm()) <= 1e-5 * float(want.norm()) + 1e-7


@every_form
def test_a_gradient_that_is_not_dense_or_aligned(form: str, device: torch.device) -> None:
    head, (x, target) = make(device).eval(), data(device)
    found = forward(form, head, x, target)
    ys = [found[name] for name in seeds(found)]
    wanted = [x, *head.parameters()]
    plain = [torch.full(y.shape, 0.5, device=device) for y in ys]
    expected = torch.autograd.grad(ys, wanted, plain, retain_graph=True)
    for odd in (
        [torch.full((), 0.5, device=device).expand(y.shape) for y in ys],
        [offset(g, 4) for g in plain],
    ):
        grads = torch.autograd.grad(ys, wanted, odd, retain_graph=True)
        assert all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))


def test_a_second_derivative_of_the_fused_loss_is_refused(device: torch.device) -> None:
    head, (x, target) = make(device), data(device)
    for _ in range(2):
        loss, _ = fused_ggam_loss(head, x, target)
        with pytest.raises(RuntimeError, match=r"fused_ggam_loss can be differentiated once.*GGAMLoss"):
            torch.autograd.grad(loss, x, create_graph=True)


def of_attention(head: Any, x: Tensor, target: Tensor) -> Tensor:
    out = head(x, target)
    return parity.combine(out._replace(cam_weights=out.cam_weights.detach())) + out.guidance_loss


@pytest.mark.parametrize("form", ["guided", "logits"])
def test_second_order_gradients(form: str, device: torch.device) -> None:
    head, reference = parity.pair(device=device, dtype=torch.float32, backend="triton", hidden_size=8)
    head.eval()
    reference.double().eval()
    x, target = data(device)
    results = []
    for module, a in ((head, x), (reference, x.detach().double().requires_grad_())):
        total = of_attention(module, a, target) if form == "guided" else parity.combine(module(a))
        first = parity.gradients(total, a, module, create_graph=True)
        penalty = sum((parity.combine(g, 3) for g in first.values() if g.requires_grad), torch.zeros(()))
        second = parity.gradients(penalty, a, module)
        results.append((first, second))
    for found, expected in zip(*results, strict=True):
        parity.assert_parity(found, expected, 1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", ["channel_spatial", "channel", "spatial"])
def test_attention_in_the_loss(attention: str, training: bool, device: torch.device) -> None:
    """Of S and T; running statistics move once."""
    head, reference = parity.pair(
        device=device, dtype=torch.float32, backend="triton", hidden_size=8, attention=attention
    )
    reference.double().train(training)
    head.train(training)
    x, target = data(device)
    for _ in range(2):
        found = parity.gradients(of_attention(head, x, target), x, head)
        exact = x.detach().double().requires_grad_()
        expected = parity.gradients(of_attention(reference, exact, target), exact, reference)
        parity.assert_parity(found, expected, 1e-4)
        parity.assert_parity(dict(head.named_buffers()), dict(reference.named_buffers()), 1e-5)


@pytest.mark.parametrize("attention", ["none", "spatial", "channel"])
def test_constant_outputs_have_no_gradient(attention: str, device: torch.device) -> None:
    head, (x, target) = make(device, attention=attention), data(device)
    recorded.enabled = False
    expected = [y.requires_grad for y in copy.deepcopy(head)(x, target)]
    recorded.enabled = True
    assert [y.requires_grad for y in head(x, target)] == expected


@pytest.mark.parametrize("what", ["loss", *GGAMOutput._fields])
@guided_forms
def test_outputs_changed_in_place(form: str, what: str, device: torch.device) -> None:
    """The gradients as without recordings, or an error of torch's; never others."""
    head, (x, target) = make(device), data(device)
    if form == "guided" and what == "loss":
        pytest.skip("has none")
    results = []
    for enabled in (False, True):
        recorded.enabled, twin = enabled, copy.deepcopy(head)
        found = forward(form, twin, x, target)
        found[what].mul_(2)
        if form == "guided" and what == "spatial_attention":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                pull(found, twin, x)
        else:
            results.append(pull(found, twin, x))
    if len(results) == 2:
        assert_same(results[1], results[0])


@every_form
def test_an_error_between_launches(form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    head, (x, target) = make(device).eval(), data(device)
    expected = run(form, head, x, target)
    for fails_at in (0, 5):
        left = [fails_at]

        def fail(
            self: Any, *arguments: Any, left: list[int] = left, first: Any = record.Launch.first
        ) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError("no memory")
            first(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(record.Launch, "first", fail)
            patch.setattr(record.Tape, "_launch", fail)
            with pytest.raises(MemoryError):
                run(form, head, x, target)
        assert_same(run(form, head, x, target), expected, 0)


def test_copies_and_files(device: torch.device) -> None:
    head, (x, target) = make(device).eval(), data(device)
    expected = run("fused", head, x, target)
    out = head(x, target)
    file = io.BytesIO()
    torch.save((head, [y.detach() for y in out]), file)
    file.seek(0)
    loaded, outputs = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), loaded):
        assert_same(run("fused", twin, x, target), expected, 0)
    pairs = [
        *zip(outputs, out, strict=True),
        *zip(copy.deepcopy([y.detach() for y in out]), out, strict=True),
    ]
    assert all(torch.equal(a, b) for a, b in pairs)
    file = io.BytesIO()
    torch.save(out.logits.detach(), file)
    assert len(file.getvalue()) < 4000  # and not an arena


def test_threads(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own head and features, on recordings that they share."""
    if device.type == "cpu":  # Triton's interpreter is one for all
        executor, lock = triton.runtime.interpreter.GridExecutor, threading.RLock()

        def alone(self: Any, *arguments: Any, call: Any = executor.__call__, **keywords: Any) -> Any:
            with lock:
                return call(self, *arguments, **keywords)

        monkeypatch.setattr(executor, "__call__", alone)
    work = []
    for _ in range(2):
        head, x = make(device, hidden_size=0), torch.rand(2, C, 2, 2, device=device).requires_grad_()
        target = hard_target(device, 2)
        work.append((head, x, target, direct("fused", head, x, target)))
    wrong: list[Any] = []

    def steps(head: GGAMHead, x: Tensor, target: Tensor, expected: Result) -> None:
        try:
            for _ in range(6):
                assert_same(run("fused", head, x, target), expected, 0)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=steps, args=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("training", [True, False])
@every_form
def test_under_activation_checkpointing(form: str, training: bool, device: torch.device) -> None:
    head, (x, target) = make(device).train(training), data(device)
    twin = copy.deepcopy(head)
    found = checkpoint(lambda x: forward(form, twin, x, target), x, use_reentrant=False)
    grads = pull(found, twin, x)
    expected = run(form, head, x, target)
    assert_same(grads, {name: expected[name] for name in grads}, 0)


@every_form
@pytest.mark.parametrize("sliced", [False, True])
def test_saved_tensors_that_are_packed(form: str, sliced: bool, device: torch.device) -> None:
    """Also where a copy has other strides than the features."""
    head, (x, target) = make(device), data(device)
    if sliced:
        x = torch.cat([x.detach()] * 2, 1)[:, :C].requires_grad_()
        assert not x.is_contiguous()
    expected = run(form, copy.deepcopy(head), x, target)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
        found = run(form, head, x, target)
    assert_same(found, expected, 0)


@pytest.mark.parametrize("bad", [-1, K, -100])
@pytest.mark.parametrize("form", [*GUIDED, "loss"])
def test_labels_out_of_range(
    form: str, bad: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first call and in later ones, where no compiled kernel asserts it."""
    if device.type == "cuda":
        pytest.skip("an assertion on the device ends the process")
    monkeypatch.setenv("GGAM_FAST_BACKEND", "triton")
    head, (x, target) = make(device).eval(), data(device)
    wrong = target.clone()
    wrong[2] = bad
    logits = torch.randn(3, K)

    def go(target: Tensor) -> object:
        return GGAMLoss()(logits, target) if form == "loss" else forward(form, head, x, target)

    for target_ in (wrong, target, wrong):
        context = (
            nullcontext() if target_ is target else pytest.raises(ValueError, match=r"target must be in")
        )
        with context:  # type: ignore[attr-defined]
            go(target_)


def test_checks_are_asked_for(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make(device)
    compiled: Any = SimpleNamespace(forward=SimpleNamespace(compiled=True), checked=False)
    wrong = torch.full((3,), K, device=device)
    recorded._check_labels(compiled, head, wrong)  # a kernel asserts it
    monkeypatch.setenv("GGAM_FAST_CHECKS", "1")
    with pytest.raises(ValueError, match="target must be in"):
        recorded._check_labels(compiled, head, wrong)
    x, target = data(device)
    expected = unrecorded("fused", head, x, target)
    assert_same(run("fused", head, x, target), expected)


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
@guided_forms
def test_ignored_images(form: str, value: float, device: torch.device) -> None:
    """No loss, no gradient, and not in the means; nothing of theirs in what others get."""
    head, (x, target) = make(device, ignore_index=-100).eval(), data(device)
    target[1] = -100
    kept = [0, 2]
    with torch.no_grad():
        x[1] = x[1] * value
    head.requires_grad_(False)  # where 0 times what is not finite is not finite
    alone = x.detach()[kept].requires_grad_()
    expected = run("fused", head, alone, target[kept])
    for _ in range(2):
        found = forward(form, head, x, target)
        loss = found["loss"] if form == "fused" else GGAMLoss(0.7, 0.1, -100)(GGAMOutput(**found), target)
        (da,) = torch.autograd.grad(loss, x, torch.tensor(SCALE, device=device))
        assert not da[1].any() or (value != 1.0 and not da[1].nan_to_num(0.0, 0.0, 0.0).any())
        assert relative_error(da[kept], expected["features"]) < 1e-5
        assert relative_error(loss, expected["loss"]) < 1e-5
        assert relative_error(found["guidance_loss"], expected["guidance_loss"]) < 1e-5


# ---- GGAMLoss


@pytest.mark.filterwarnings("ignore:.*plain logits")
@pytest.mark.parametrize("kind", ["hard", "soft", "ignored"])
@pytest.mark.parametrize("guided", [True, False])
def test_the_loss_alone(
    kind: str, guided: bool, device: torch.device, recordings: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGAM_FAST_BACKEND", "triton")
    ignore = -100 if kind == "ignored" else None
    for weight, smoothing in ((1, 0), (0.3, 0.2)):
        logits = torch.randn(N, K, device=device, requires_grad=True)
        guidance = torch.rand((), device=device, requires_grad=True)
        target = drawn_target(kind, device)
        inputs = [logits, guidance][: 1 + guided]
        results = []
        for enabled in (False, True):
            recorded.enabled = enabled
            out = GGAMOutput(logits, *[logits] * 3, guidance) if guided else logits
            loss = GGAMLoss(weight, smoothing, ignore)(out, target)
            first = torch.autograd.grad(loss * 2, inputs, retain_graph=True)
            graph = torch.autograd.grad(loss * 2, inputs, create_graph=True)
            second = torch.autograd.grad(graph[0].square().sum(), logits, retain_graph=True)
            batch = torch.autograd.grad(
                loss, inputs, torch.tensor([1.0, 2.0], device=device), is_grads_batched=True
            )
            results.append([loss.detach(), *first, *graph, *second, *batch])
        for found, expected in zip(*reversed(results), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert made(recordings) == 1


@pytest.mark.parametrize("option", ["weight", "reduction", "return_parts"])
def test_other_losses_are_not_recorded(
    option: str, device: torch.device, recordings: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGAM_FAST_BACKEND", "triton")
    logits, target = torch.randn(N, K, device=device), drawn_target("hard", device)
    GGAMLoss(0)(logits, target)
    assert made(recordings) == 1
    value = {"weight": torch.ones(K, device=device), "reduction": "none", "return_parts": True}[option]
    options: dict[str, Any] = {option: value}
    GGAMLoss(0, **options)(logits, target)
    assert made(recordings) == 1


def test_a_soft_target_can_be_learned(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGAM_FAST_BACKEND", "triton")
    logits = torch.randn(N, K, device=device, requires_grad=True)
    target = torch.rand(N, K, device=device, requires_grad=True)
    (found,) = torch.autograd.grad(GGAMLoss(0)(logits, target), target)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, target), target)
    torch.testing.assert_close(found, expected)


# ---- memory


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each tensor that torch is asked for by name."""
    found: list[int] = []
    for name in ("empty", "empty_strided", "zeros", "ones", "full", "empty_like", "zeros_like"):
        make = getattr(torch, name)

        def allocate(*arguments: Any, make: Any = make, **keywords: Any) -> Tensor:
            out = make(*arguments, **keywords)
            found.append(out.nbytes)
            return out

        monkeypatch.setattr(torch, name, allocate)
    return found


@every_form
def test_nothing_of_the_features_size_but_its_gradient(
    form: str, device: torch.device, allocations: list[int]
) -> None:
    head = make(device, hidden_size=0)
    x, target = torch.rand(2, C, 24, 24, device=device).requires_grad_(), hard_target(device, 2)
    dys = seeds(forward(form, head, x, target))
    allocations.clear()
    found = forward(form, head, x, target)
    assert allocations
    assert sum(allocations) < x.nbytes / 2
    ys = [found[name] for name in dys]
    torch.autograd.grad(ys, [x, *head.parameters()], list(dys.values()), allow_unused=True)
    large = [n for n in allocations if n >= x.nbytes / 2]
    assert large == [x.nbytes]


@every_form
def test_gradients_do_not_keep_the_arena(
    form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, (x, target) = make(device), data(device)
    arenas: list[weakref.ref[Tensor]] = []

    forward(form, head, x, target)
    (found_,) = recorded._recordings.values()
    assert found_ is not None

    def kept(make: Any = found_.kept) -> Tensor:
        out = make()
        arenas.append(weakref.ref(out))
        return out

    monkeypatch.setattr(found_, "kept", kept)
    found = forward(form, head, x, target)
    grads = pull(found, head, x, retain_graph=True)
    assert arenas[-1]() is not None
    del found
    assert arenas[-1]() is None
    assert grads["features"].untyped_storage().nbytes() == x.nbytes
    own = sum(p.nbytes for p in head.parameters())
    assert grads["fc1.weight"].untyped_storage().nbytes() <= own + 16 * len(grads)
    found = forward(form, head, x, target)  # and no backward
    assert arenas[-1]() is not None
    del found
    gc.collect()
    assert arenas[-1]() is None


def test_outputs_do_not_keep_the_features(device: torch.device) -> None:
    head, (x, target) = make(device), data(device)
    for _ in range(2):
        for form in ("fused", "guided", "logits"):
            a = x * 1
            alive = weakref.ref(a)
            found = {name: y for name, y in forward(form, head, a, target).items() if name != "loss"}
            found = {name: y.detach() for name, y in found.items()}
            del a
            assert alive() is None
            assert found["logits"].shape == (3, K)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert launching.thread.recorder is None
