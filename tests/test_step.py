"""The fused criterion against the head followed by GGAMLoss: same loss, outputs, gradients and state."""

import copy
import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bench.measure import timing
from ggam_fast import GGAMHead, GGAMLoss, GGAMOutput, checks
from ggam_fast.backends.torch import Backend
from ggam_fast.functional import fused_ggam_loss
from ggam_fast.reference import GGAMHeadReference
from tests import parity

OPTIONS = {
    **{k: v for k, v in parity.OPTIONS.items() if k != "cam_detach"},
    "pool_type": ("avg", "max"),
    "hidden_size": (8, 0),
    "input_fmt": ("NCHW", "NHWC", "NLC"),
}
WEIGHTS = {"guidance_weight": 0.7, "label_smoothing": 0.1}
BACKENDS = ("torch", pytest.param("triton", marks=pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="")))
needs_triton = pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="needs triton")
Result = dict[str, Tensor]


@pytest.fixture
def unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggam_fast.recorded.enabled", False)


def result(head: nn.Module, loss: Tensor, out: GGAMOutput, x: Tensor, scale: float = 3.0) -> Result:
    """Loss, outputs, and gradients of `scale` times the loss."""
    found = parity.gradients(loss * scale, x, head)
    return {"loss": loss.detach(), **out._asdict(), **found}


def composed(head: Any, x: Tensor, target: Tensor) -> Result:
    out = head(x, target)
    return result(head, GGAMLoss(**WEIGHTS)(out, target), out, x)


def fused(head: Any, x: Tensor, target: Tensor) -> Result:
    return result(head, *fused_ggam_loss(head, x, target, **WEIGHTS), x)


def state(head: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


def assert_same(found: Result, expected: Result, tolerance: float) -> None:
    parity.assert_parity(found, expected, tolerance)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("options", list(parity.draws(OPTIONS, 36, "fused loss")), ids=str)
def test_is_the_head_and_its_loss(options: dict[str, Any], soft: bool, device: torch.device) -> None:
    head, _ = parity.pair(device=device, **options)
    x = parity.as_format(parity.features(device), options["input_fmt"]).requires_grad_()
    target = parity.soft_target(device) if soft else parity.hard_target(device)
    before = state(head)
    torch.manual_seed(1)
    expected = composed(head, x, target)
    after = state(head)
    head.load_state_dict(before)
    torch.manual_seed(1)
    found = fused(head, x, target)
    assert_same(found, expected, 1e-10)
    for name, value in state(head).items():
        torch.testing.assert_close(value, after[name], msg=f"{name} moved otherwise than by one forward")


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
@pytest.mark.parametrize(
    "options", [{}, {"pool_type": "max"}, {"attention": "spatial"}, {"spatial_norm": "sum"}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_float64_reference(
    backend: str, dtype: torch.dtype, options: dict[str, Any], layout: str, device: torch.device
) -> None:
    head, reference = parity.pair(device=device, dtype=torch.float32, cam_norm="standardized", **options)
    reference.double()
    head.backend = backend
    x = parity.features(device, dtype, layout).requires_grad_()
    exact = x.detach().double().requires_grad_()
    target = parity.hard_target(device)
    found, expected = fused(head, x, target), composed(reference, exact, target)
    da = found.pop("features"), expected.pop("features")
    assert da[0].dtype == dtype
    assert da[0].stride() == x.detach().contiguous().stride() or layout == "channels_last"
    assert parity.relative_error(*da) < (1e-4 if dtype == torch.float32 else 2**-7)
    assert_same(found, expected, 1e-4)


@pytest.mark.parametrize(
    "options", [{"cam_detach": False}, {"pool_type": "flatten", "feat_size": (3, 5)}], ids=str
)
def test_composes_where_it_cannot_share(options: dict[str, Any], device: torch.device) -> None:
    head, reference = parity.pair(device=device, hidden_size=0, **options)
    x, target = parity.features(device).requires_grad_(), parity.hard_target(device)
    assert_same(fused(head, x, target), composed(reference, x, target), 1e-9)


def test_your_own_classifier(device: torch.device) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(parity.C, 9), nn.Tanh(), nn.Linear(9, parity.K))

    head, reference = parity.pair(device=device, build_classifier=build)
    x, target = parity.features(device).requires_grad_(), parity.hard_target(device)
    assert_same(fused(head, x, target), composed(reference, x, target), 1e-10)


def test_nothing_of_the_features_size_is_saved_but_the_features(device: torch.device) -> None:
    head = GGAMHead(parity.C, parity.K, hidden_size=0, device=device)
    x, target = parity.features(device, torch.float32).requires_grad_(), parity.hard_target(device)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_ggam_loss(head, x, target)
    large = {t.data_ptr() for t in saved if t.numel() >= x.numel()}
    assert large == {x.data_ptr()}


VIEWS = ("view", "t", "transpose", "expand", "unsqueeze", "squeeze", "select", "slice", "detach", "unbind",
         "_unsafe_view")  # fmt: skip


class Operations(TorchDispatchMode):
    """How many operations reach the device, views and what Triton's interpreter does apart."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS and not self.interpreted()
        return func(*args, **(kwargs or {}))

    @staticmethod
    def interpreted() -> bool:
        frame = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.endswith("runtime/interpreter.py"):
            frame = frame.f_back  # type: ignore[assignment]
        return frame is not None


@pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="")
def test_a_step_has_fewer_operations_than_the_references(device: torch.device) -> None:
    """Where the map is small, what a step costs is how many operations it takes; with torch's own norm, as in
    torch operations (where nothing is recorded) settling statistics take seven more each."""
    head, reference = parity.pair(device=device, dtype=torch.float32, norm_layer=nn.BatchNorm1d)
    head.backend = "triton"
    x, target = parity.features(device, torch.float32).requires_grad_(), parity.hard_target(device)
    losses = {
        "fused": lambda: fused_ggam_loss(head, x, target).loss,
        "composed": lambda: GGAMLoss()(head(x, target), target),
        "reference": lambda: GGAMLoss()(reference(x, target), target),
    }
    found = {}
    for name, loss in losses.items():
        loss().backward()  # the first one is recorded
        x.grad = None  # nothing is accumulated
        head.zero_grad()
        reference.zero_grad()
        with Operations() as operations:
            loss().backward()
        found[name] = operations.count
    assert found["fused"] <= 49, found
    assert found["composed"] <= 81, found
    assert found["reference"] > 100, found


@pytest.mark.parametrize(("n", "c"), [(32, 2048), (256, 512)])
def test_a_step_holds_less_than_a_tenth_of_the_features(
    n: int, c: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond A, dA, the parameters and their gradients; without what torch operations make of A's size where
    kernels make nothing."""
    small = {
        "channel_sum": lambda self, a, w: w.new_zeros(a.shape[0], a.shape[2]),
        "spatial_sum": lambda self, a, w=None, scale=1.0: torch.rand(a.shape[:2]),
        "attention_backward": lambda self, a, grads, *_: [
            (v.new_zeros(len(v), a.shape[2]), v + 0) for v in grads
        ],
        "features_grad": lambda self, a, *_: torch.empty_like(a),
    }
    for name, stage in small.items():
        monkeypatch.setattr(Backend, name, stage)
    head = GGAMHead(c, 200)
    x = torch.randn(n, c, 14, 14, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(200, (n,))

    def step() -> None:
        fused_ggam_loss(head, x, target).loss.backward()

    step()
    gradients = sum(t.grad.nbytes for t in (x, *head.parameters()) if t.grad is not None)
    x.grad = None
    head.zero_grad()
    assert timing.peak_bytes(lambda _: step()) - gradients < 0.08 * x.nbytes


@pytest.mark.parametrize("hidden_size", [0, 7])
@pytest.mark.parametrize("n", [2, 64])
def test_gradients_held_as_factors_and_as_themselves(n: int, hidden_size: int, device: torch.device) -> None:
    """Few images: weights of 20 x 7 and less have more elements than their factors; many: fewer."""
    head = GGAMHead(20, 5, hidden_size=hidden_size, rd_channels=6).to(device, torch.float64)
    x = torch.randn(n, 20, 3, 3, dtype=torch.float64, device=device).requires_grad_()
    target = torch.randint(5, (n,), device=device)
    parameters = [x, *head.parameters()]
    found = torch.autograd.grad(fused_ggam_loss(head, x, target, guidance_weight=0.5).loss * 3, parameters)
    expected = torch.autograd.grad(GGAMLoss(0.5)(head(x, target), target) * 3, parameters)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


def test_batched_gradients(device: torch.device) -> None:
    head, _ = parity.pair(device=device)
    x, target = parity.features(device).requires_grad_(), parity.hard_target(device)
    loss = fused_ggam_loss(head, x, target).loss
    scales = torch.tensor([1.0, 3.0], dtype=loss.dtype, device=device)
    (found,) = torch.autograd.grad(loss, x, scales, is_grads_batched=True, retain_graph=True)
    (expected,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, torch.stack([expected, 3 * expected]))


def test_under_activation_checkpointing(device: torch.device) -> None:
    """Non-reentrant checkpointing lets what is saved be unpacked once."""
    head, _ = parity.pair(device=device)
    x, target = parity.features(device).requires_grad_(), parity.hard_target(device)
    before = state(head)
    (expected,) = torch.autograd.grad(fused_ggam_loss(head, x, target).loss, x)
    head.load_state_dict(before)
    loss = checkpoint(lambda x: fused_ggam_loss(head, x, target).loss, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_without_gradients_and_for_an_empty_batch(device: torch.device) -> None:
    head, _ = parity.pair(device=device)
    x, target = parity.features(device), parity.hard_target(device)
    head.eval()
    expected = fused_ggam_loss(head, x, target)
    with torch.no_grad():
        found = fused_ggam_loss(head, x, target)
    torch.testing.assert_close(found.loss, expected.loss.detach())
    assert not found.loss.requires_grad
    empty = x[:0].requires_grad_()
    loss, out = fused_ggam_loss(head, empty, target[:0])
    loss.backward()
    assert float(loss) == 0.0
    assert out.logits.shape == (0, parity.K)
    assert empty.grad is not None


def test_features_that_need_no_gradient(device: torch.device) -> None:
    """A frozen backbone: the parameters' gradients alone, and no dA."""
    head, reference = parity.pair(device=device)
    x, target = parity.features(device), parity.hard_target(device)
    fused_ggam_loss(head, x, target, **WEIGHTS).loss.backward()
    GGAMLoss(**WEIGHTS)(reference(x, target), target).backward()
    for (name, p), q in zip(head.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_a_second_derivative_is_refused_not_wrong(device: torch.device) -> None:
    head, _ = parity.pair(device=device)
    x, target = parity.features(device).requires_grad_(), parity.hard_target(device)
    loss, _ = fused_ggam_loss(head, x, target)
    with pytest.raises(RuntimeError, match=r"fused_ggam_loss can be differentiated once.*GGAMLoss"):
        torch.autograd.grad(loss, x, create_graph=True)
    head.eval()  # whose batch norm moves nothing
    with pytest.raises(RuntimeError, match=r"fused_ggam_loss can be differentiated once.*torch.func.grad"):
        torch.func.grad(lambda a: fused_ggam_loss(head, a, target).loss)(x.detach())


@pytest.mark.parametrize("compiled", [False, True])
def test_wrappers_that_change_nothing(compiled: bool, device: torch.device) -> None:
    head, _ = parity.pair(device=device, dtype=torch.float32)
    x, target = parity.features(device, torch.float32).requires_grad_(), parity.hard_target(device)
    head.eval()
    expected = result(head, *fused_ggam_loss(head, x, target, **WEIGHTS), x)
    for wrapped in (
        torch.compile(head),
        checkpoint_wrapper(head),
        torch.compile(checkpoint_wrapper(head)),
        checkpoint_wrapper(torch.compile(head)),
    ):

        def step(x: Tensor, wrapped: nn.Module = wrapped) -> tuple[Tensor, GGAMOutput]:
            return tuple(fused_ggam_loss(wrapped, x, target, **WEIGHTS))

        run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        x.grad = None
        assert_same(result(head, *run(x), x), expected, 1e-5)


def test_wrappers_that_synchronise_are_refused_with_a_hint(device: torch.device) -> None:
    head, _ = parity.pair(device=device)
    x, target = parity.features(device), parity.hard_target(device)
    for wrapped in (nn.DataParallel(head), checkpoint_wrapper(nn.DataParallel(head))):
        with pytest.raises(TypeError, match=r"got \w+; call fused_ggam_loss inside the wrapped module"):
            fused_ggam_loss(wrapped, x, target)
    with pytest.raises(TypeError, match=r"head must be a GGAMHead; got OptimizedModule$"):
        fused_ggam_loss(torch.compile(nn.Linear(2, 2)), x, target)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_step(autocast: bool, device: torch.device) -> None:
    head, _ = parity.pair(device=device, dtype=torch.float32, cam_norm="standardized")
    x = parity.features(device, torch.bfloat16 if autocast else torch.float32)
    target = parity.hard_target(device)

    def step(x: Tensor) -> tuple[Tensor, GGAMOutput]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            return tuple(fused_ggam_loss(head, x, target, **WEIGHTS))

    before = state(head)
    eager_x, compiled_x = (x.clone().requires_grad_() for _ in range(2))
    expected = result(head, *step(eager_x), eager_x)
    head.load_state_dict(before)
    found = result(head, *torch.compile(step, fullgraph=True)(compiled_x), compiled_x)
    assert_same(found, expected, 1e-2 if autocast else 1e-5)


def test_gradients_under_a_loss_scale(device: torch.device) -> None:
    """float16: the scale that arrives is multiplied in before dA is rounded, so that nothing underflows."""
    head = GGAMHead(parity.C, parity.K, hidden_size=0, device=device)
    half = parity.features(device, torch.float16).requires_grad_()
    exact = half.detach().double().requires_grad_()
    target, scale = parity.hard_target(device), 2.0**-12  # dA would be zero in float16
    found = torch.autograd.grad(fused_ggam_loss(head, half, target).loss * scale * 2.0**14, half)[0]
    expected = torch.autograd.grad(fused_ggam_loss(head.double(), exact, target).loss * scale, exact)[0]
    assert parity.relative_error(found.double() / 2.0**14, expected) < 1e-3


class Confident(nn.Module):
    """A linear classifier that is sure of class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(parity.C, parity.K)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + 14.0 * (torch.arange(parity.K, device=x.device) == 0)


def test_small_gradients_pass_a_classifier_in_float16(device: torch.device) -> None:
    """d CE / d logits of 1e-8 is far below float16, and the loss scale comes after it."""
    head = GGAMHead(parity.C, parity.K, classifier=Confident(), attention_scale="printed").to(device)
    x = parity.features(device, torch.float32).requires_grad_()
    target = torch.zeros(x.shape[0], dtype=torch.int64, device=device)

    with torch.autocast(x.device.type, torch.float16):
        fused = fused_ggam_loss(head, x, target, guidance_weight=0.0).loss
        composed = GGAMLoss(0.0)(head(x, target), target)
    expected = torch.autograd.grad(composed * 65536.0, x)[0] / 65536.0
    assert 0 < expected.abs().max() < 1e-8
    most = 1e-2 if device.type == "cpu" else 2e-2  # both are float16's: 1.1e-2 on an H100
    assert parity.relative_error(torch.autograd.grad(fused, x)[0], expected) < most


def test_a_large_scale_on_float16_parameters(device: torch.device) -> None:
    torch.manual_seed(0)
    head = GGAMHead(parity.C, parity.K, hidden_size=0, device=device, dtype=torch.float16)
    x, target = parity.features(device, torch.float16), parity.hard_target(device)
    (fused_ggam_loss(head, x, target).loss * 65536.0).backward()
    found = [p.grad.double() for p in head.parameters() if p.grad is not None]
    head.zero_grad()
    head.double()
    (fused_ggam_loss(head, x.double(), target).loss * 65536.0).backward()
    expected = [p.grad for p in head.parameters() if p.grad is not None]
    for one, exact in zip(found, expected, strict=True):
        assert parity.relative_error(one, exact) < 1e-2


@pytest.mark.parametrize("call", ["head", "fused"])
def test_nothing_of_a_step_waits_for_the_garbage_collector(call: str, device: torch.device) -> None:
    classifier = nn.Sequential(nn.Linear(parity.C, 9), nn.Tanh(), nn.Linear(9, parity.K))
    outputs: list[weakref.ref[Tensor]] = []
    classifier[1].register_forward_hook(lambda m, i, o: outputs.append(weakref.ref(o)))
    head = GGAMHead(parity.C, parity.K, classifier=classifier).to(device)
    x, target = parity.features(device, torch.float32).requires_grad_(), parity.hard_target(device)
    gc.disable()
    try:
        head(x, target) if call == "head" else fused_ggam_loss(head, x, target)
        assert [r() for r in outputs] == [None]
    finally:
        gc.enable()


def test_compiled_with_your_own_classifier(device: torch.device) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(parity.C, 9), nn.Tanh(), nn.Linear(9, parity.K))

    head, _ = parity.pair(device=device, dtype=torch.float32, build_classifier=build)
    target = parity.hard_target(device)
    x = parity.features(device, torch.float32)
    eager_x, compiled_x = (x.clone().requires_grad_() for _ in range(2))
    expected = result(head, *fused_ggam_loss(head, eager_x, target), eager_x)
    step = torch.compile(
        lambda x: tuple(fused_ggam_loss(head, x, target)), fullgraph=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = result(head, *step(compiled_x), compiled_x)
    assert_same(found, expected, 1e-5)


def test_an_infinite_cross_entropy_is_infinite(device: torch.device) -> None:
    head = GGAMHead(parity.C, parity.K, hidden_size=0, device=device)
    with torch.no_grad():
        head.classifier.bias[0], head.classifier.bias[1] = 3e38, -3e38
    target = torch.ones(parity.N, dtype=torch.int64, device=device)
    loss = fused_ggam_loss(head, parity.features(device, torch.float32), target).loss
    assert loss.item() == float("inf")


def test_errors_name_the_argument(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    head, reference = parity.pair(device=device, dtype=torch.float32)
    x, target = parity.features(device, torch.float32), parity.hard_target(device)
    with pytest.raises(TypeError, match="head must be a GGAMHead; got Linear"):
        fused_ggam_loss(nn.Linear(1, 1), x, target)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got DataParallel; call fused_ggam_loss inside the wrapped module"):
        fused_ggam_loss(nn.DataParallel(head), x, target)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="head must be a GGAMHead; got GGAMHeadReference"):
        fused_ggam_loss(reference, x, target)
    monkeypatch.setattr(head.fc1.weight, "full_tensor", None, raising=False)
    with pytest.raises(TypeError, match=r"head must have whole parameters; got sharded DTensors"):
        fused_ggam_loss(head, x, target)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="guidance_weight must be finite and not negative; got -1"):
        fused_ggam_loss(head, x, target, guidance_weight=-1)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\]; got 2"):
        fused_ggam_loss(head, x, target, label_smoothing=2)
    with pytest.raises(ValueError, match=r"target with class indices must be \(N,\)"):
        fused_ggam_loss(head, x, target[:-1])
    assert isinstance(reference, GGAMHeadReference)


@needs_triton
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_an_unrecorded_step_is_one_node(rate: float, unrecorded: None, device: torch.device) -> None:
    """Unless a layer is random: a second derivative would draw another mask."""
    head, _ = parity.pair(backend="triton", dtype=torch.float32, drop_rate=rate, device=device)
    out = head(parity.features(device, torch.float32).requires_grad_(), parity.hard_target(device))
    assert (type(out.guidance_loss.grad_fn).__name__ == "DropInNodeBackward") == (rate == 0.0)


@needs_triton
@pytest.mark.parametrize("pool_type", ["avg", "max"])
@pytest.mark.parametrize("attention", ["channel_spatial", "channel", "spatial", "none"])
def test_the_node_against_the_float64_reference(
    attention: str, pool_type: str, unrecorded: None, device: torch.device
) -> None:
    """Gradients of all outputs at once, and their gradients: as close as the torch backend's float32."""
    options = {"attention": attention, "pool_type": pool_type}
    head, exact = parity.pair(backend="triton", dtype=torch.float32, device=device, **options)
    peer, features, results = copy.deepcopy(head), parity.features(device), []
    peer.backend = "torch"
    for module in (head.eval(), peer.eval(), exact.double().eval()):
        x = features.to(next(module.parameters()).dtype, copy=True).requires_grad_()
        out = module(x, parity.hard_target(device))
        loss = out.logits.square().sum() + out.guidance_loss
        loss = loss + 30 * out.channel_attention.square().sum() + 30 * out.spatial_attention.square().sum()
        inputs = [x, *module.parameters()]
        first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(first[0].square().sum(), inputs, materialize_grads=True)
        results.append([*first, *second])
    for found, peers, expected in zip(*results, strict=True):
        limit = 1e-5 + 5 * parity.relative_error(peers, expected)
        assert parity.relative_error(found, expected) < limit


@needs_triton
def test_a_parameter_of_two_layers(unrecorded: None, device: torch.device) -> None:
    first, second = nn.Linear(parity.C, parity.C), nn.Linear(parity.C, parity.C)
    second.weight = first.weight
    classifier = nn.Sequential(first, nn.BatchNorm1d(parity.C), second, nn.Linear(parity.C, parity.K))
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        head = GGAMHead(parity.C, parity.K, classifier=copy.deepcopy(classifier), backend=backend).to(device)
        torch.manual_seed(1)
        x = parity.features(device, torch.float32).requires_grad_()
        results.append(composed(head, x, parity.hard_target(device)))
    assert_same(results[0], results[1], 1e-4)
