"""Compiled steps of a head: two operators each, an eager step's numbers, and Inductor's code around it."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ggam_fast import GGAMHead, GGAMLoss, GGAMOutput, checks
from tests import fake_cuda, parity
from tests.parity import C, H, K, N, W, as_format, hard_target, relative_error, soft_target

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast import compiled, recorded
from ggam_fast.backends.triton import record
from ggam_fast.backends.triton.launch import plan
from ggam_fast.classifier.layers import known_layers
from ggam_fast.functional import fused_ggam_loss
from ggam_fast.norm import SettlingBatchNorm1d

Result = dict[str, Tensor]
FORMS = ("fused", "drop_in")
NUMBERS = {"guidance_weight": 0.7, "label_smoothing": 0.1}
NORMS: dict[str, Callable[..., nn.Module]] = {
    "settling": SettlingBatchNorm1d,
    "fixed": nn.BatchNorm1d,
    "cumulative": partial(nn.BatchNorm1d, momentum=None),
    "stateless": partial(nn.BatchNorm1d, track_running_stats=False),
}
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's failed assertion ends the process")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recorded, "_recordings", {})
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(device: torch.device, **options: Any) -> GGAMHead:
    options = {"hidden_size": 8, "dtype": torch.float32, "backend": "triton", **options}
    shape = (options.pop("channels", C), options.pop("classes", K))
    return parity.pair(*shape, device=device, **options)[0].train()


def data(
    device: torch.device, n: int = N, layout: str = "nchw", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Features (N, C, H, W), or as the layout says."""
    if layout in ("NHWC", "NLC"):
        return as_format(parity.features(device, dtype, n=n), layout).contiguous().requires_grad_()
    return parity.features(device, dtype, layout, n).requires_grad_()


def loss_of(head: GGAMHead, x: Tensor, target: Tensor, **numbers: float) -> Tensor:
    return fused_ggam_loss(head, x, target, **{**NUMBERS, **numbers}).loss


def step_of(head: GGAMHead, form: str) -> Callable[[Tensor, Tensor], tuple[Tensor, GGAMOutput]]:
    """A whole step's loss and outputs; "attention": a loss of all outputs that have a gradient."""
    if form == "fused":
        return lambda x, target: tuple(fused_ggam_loss(head, x, target, **NUMBERS))  # type: ignore[return-value]
    criterion = GGAMLoss(**NUMBERS, ignore_index=head.ignore_index)

    def step(x: Tensor, target: Tensor) -> tuple[Tensor, GGAMOutput]:
        out = head(x, target)
        loss = criterion(out, target)
        if form == "attention":
            loss = loss + (out.channel_attention.square().sum() + out.spatial_attention.pow(3).sum()) / 2
        return loss, out

    return step


def run(
    head: GGAMHead, x: Tensor, target: Tensor, backend: str | None = None, form: str = "fused", **options: Any
) -> Result:
    """Loss, outputs, gradients and the buffers afterwards of one step of a copy of the head."""
    head = copy.deepcopy(head)
    step = step_of(head, form)
    if backend is not None:
        step = torch.compile(step, fullgraph=True, backend=backend, **options)
    loss, out = step(x, target)
    grads = parity.gradients(loss, x, head) if loss.requires_grad else {}
    buffers = {name: b.clone() for name, b in head.named_buffers()}
    return {"loss": loss.detach(), **{n: y.detach() for n, y in out._asdict().items()}, **grads, **buffers}


def predicted(head: GGAMHead, x: Tensor, backend: str | None = None, **options: Any) -> Result:
    """Logits, their gradients where they have some, and the buffers afterwards, of a copy of the head."""
    head = copy.deepcopy(head)
    call = head if backend is None else torch.compile(head, fullgraph=True, backend=backend, **options)
    logits = call(x)
    grads = parity.gradients(parity.combine(logits), x, head) if logits.requires_grad else {}
    return {"logits": logits.detach(), **grads, **{name: b.clone() for name, b in head.named_buffers()}}


def assert_same(found: Result, expected: Result, tolerance: float = 1e-4) -> None:
    """dA may be rounded to a half type."""
    if "features" in expected and expected["features"].dtype.itemsize == 2:
        found, expected = dict(found), dict(expected)
        a, b = found.pop("features"), expected.pop("features")
        assert a.dtype == b.dtype
        assert relative_error(a, b) < 1e-2
    parity.assert_parity(found, expected, tolerance)


def operators(graph: GraphModule) -> Counter[str]:
    """How often the graph calls each of ours."""
    targets = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    return Counter(t.name().removeprefix("ggam_fast::") for t in targets if "ggam_fast." in str(t))


def taken(form: str = "fused") -> int:
    """How many kinds of steps the operator ran."""
    name = "compiled" if form == "fused" else "compiled drop-in"
    return sum(key[0] == name for key in recorded._recordings)


# ---- the operators


NAMES = {
    "fused": ("guided_step", "guided_step_grads"),
    "drop_in": ("drop_in_step", "drop_in_step_grads"),
    "logits": ("drop_in_step", "drop_in_step_grads"),
}


def arguments(
    monkeypatch: pytest.MonkeyPatch, head: GGAMHead, x: Tensor, target: Tensor, whole: bool, form: str
) -> Any:
    """What a step gives each of the two operators."""
    given: dict[str, tuple[Any, ...]] = {}
    for name in NAMES[form]:

        def call(*inputs: Any, name: str = name) -> Any:
            given[name] = inputs
            return getattr(torch.ops.ggam_fast, name).default(*inputs)

        monkeypatch.setattr(compiled, name, call)
    flat, _, mlp, options, _ = head._inputs(x)
    layers = known_layers(head.classifier, head.drop)
    assert layers is not None
    terms = head._loss_terms(0.7, 0.1)
    assert compiled.applies(flat, mlp, options, layers, target)
    step, given_target, given_terms = compiled.drop_in, target, terms
    if form == "fused":
        step = compiled.fused_loss
    elif form == "logits":
        given_target = given_terms = None
    found = step(flat, mlp, options, layers, given_target, given_terms, x if whole else None)
    (found.loss if form == "fused" else parity.combine(found)).backward()
    return [given[name] for name in NAMES[form]]


OPERATORS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "default": ({}, "nchw", False),
    "channels_last": ({"attention_scale": "printed"}, "channels_last", True),
    "channel, ignoring": ({"attention": "channel", "ignore_index": 2}, "channels_last", False),
    "spatial, soft target": ({"attention": "spatial", "hidden_size": 0}, "nchw", False),
    "neither": ({"attention": "none", "hidden_size": 7}, "channels_last", True),
}


class ClearedTorch:
    """torch, but for what is between the parts of an output: that is never written, nor read."""

    empty = staticmethod(torch.zeros)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str, form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """opcheck: schema, so no mutated or aliased tensor, fakes, and dynamic shapes."""
    if form == "logits" and name not in ("default", "neither"):
        pytest.skip("the target's options")
    monkeypatch.setattr(record, "torch", ClearedTorch())
    options, layout, whole = OPERATORS[name]
    target = soft_target(device).float() if "soft" in name else hard_target(device)
    given = arguments(monkeypatch, make(device, **options), data(device, layout=layout), target, whole, form)
    for operator, inputs in zip(NAMES[form], given, strict=True):
        torch.library.opcheck(getattr(torch.ops.ggam_fast, operator).default, inputs)


@pytest.mark.parametrize("form", NAMES)
def test_operators_leave_their_inputs(
    form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(monkeypatch, make(device), data(device), hard_target(device), False, form)
    for name, inputs in zip(NAMES[form], given, strict=True):
        operator = getattr(torch.ops.ggam_fast, name).default
        lists = [x for one in inputs if isinstance(one, (list, tuple)) for x in one]
        tensors = [x for x in (*inputs, *lists) if isinstance(x, Tensor)]
        before = [x.clone() for x in tensors]
        found = operator(*inputs)
        made = [found] if isinstance(found, Tensor) else list(found)
        assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
        storages = [x.untyped_storage().data_ptr() for x in (*tensors, *made)]
        ours = {*storages[len(tensors) :]}
        assert len(ours) == len(made)
        assert not ours & {*storages[: len(tensors)]}


# ---- the eager step's numbers

VALUES: dict[str, Any] = {
    "attention": ("channel_spatial", "channel", "spatial", "none"),
    "spatial_norm": ("softmax", "sum", "sigmoid"),
    "attention_scale": ("unit_mean", "printed"),
    "cam_at": ("features", "attended"),
    "cam_class": ("label", "predicted"),
    "cam_norm": ("sigmoid", "softmax", "standardized", "standardized_softmax"),
    "cam_temperature": (1.0, 0.3),
    "divergence": ("symmetric", "forward", "reverse"),
    "guidance_reduction": (None, "mean", "sum"),
    "hidden_size": (8, 0, 7),
    "norm": (*NORMS,),
    "act_layer": (nn.ELU, nn.ReLU),
    "training": (True, True, False),
    "ignore_index": (None, 2, -100),
    "soft": (False, False, True),
    "layout": ("nchw", "channels_last", "sliced", "NLC", "NHWC"),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
}
DRAWS = [*parity.draws(VALUES, 12, "compiled")]


def drawn(device: torch.device, case: dict[str, Any]) -> tuple[GGAMHead, Tensor, Tensor]:
    case = dict(case)
    norm, training, soft, layout, dtype = (
        case.pop(n) for n in ("norm", "training", "soft", "layout", "dtype")
    )
    fmt = layout if layout in ("NLC", "NHWC") else "NCHW"
    head = make(device, norm_layer=NORMS[norm], input_fmt=fmt, **case).train(training)
    if case["ignore_index"] == 2 or soft:
        target = soft_target(device).float() if soft else torch.tensor([1, 2, 0, 2], device=device)
    else:
        target = hard_target(device)
        if case["ignore_index"] is not None:
            target[1] = case["ignore_index"]
    return head, data(device, layout=layout, dtype=dtype), target


@pytest.mark.parametrize("form", ["fused", "attention"])
@pytest.mark.parametrize("case", DRAWS, ids=map(str, range(len(DRAWS))))
def test_numbers(
    case: dict[str, Any], form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, x, target = drawn(device, case)
    found = run(head, x, target, "aot_eager", form)
    assert taken(form) == 1
    assert_same(found, run(head, x, target, form=form))
    monkeypatch.setattr(recorded, "enabled", False)
    assert_same(found, run(head, x, target, form=form))


@pytest.mark.parametrize(
    ("form", "attention", "cam_at", "ignore_index"),
    [("fused", "spatial", "features", None), ("attention", "channel_spatial", "attended", 2)],
)
def test_guidance_of_positions(
    form: str, attention: str, cam_at: str, ignore_index: int | None, device: torch.device
) -> None:
    options = {"position_guidance": "standardized_softmax", "position_temperature": 0.7}
    head = make(device, attention=attention, cam_at=cam_at, ignore_index=ignore_index, **options)
    x, target = data(device), torch.tensor([1, 2, 0, 2], device=device)
    found = run(head, x, target, "aot_eager", form)
    assert taken(form) == 1
    assert "position_loss" in found
    assert_same(found, run(head, x, target, form=form))


@pytest.mark.parametrize("case", DRAWS[:6], ids=map(str, range(6)))
def test_logits(case: dict[str, Any], device: torch.device) -> None:
    """With a graph and without one."""
    head, x, _ = drawn(device, case)
    assert_same(predicted(head, x, "aot_eager"), predicted(head, x))
    with torch.no_grad():
        assert_same(predicted(head, x, "aot_eager"), predicted(head, x))
    assert taken("drop_in") == 2


@pytest.mark.parametrize("training", [True, False])
def test_inference_is_one_operator(training: bool, device: torch.device) -> None:
    head, x, target = make(device).train(training), data(device), hard_target(device)
    with torch.no_grad():
        for call in (lambda x: head(x), lambda x: head(x, target).cam_weights):
            (graph,) = fake_cuda.graphs(call, x)
            assert operators(graph) == {"drop_in_step": 1}
            (node,) = [n for n in graph.graph.nodes if "drop_in_step" in str(n.target)]
            _, kept = node.meta["val"]
            assert kept.numel() == 2 * (C + 8)  # the norms' statistics: nothing for a backward
    with torch.inference_mode():
        found = torch.compile(head, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, copy.deepcopy(head)(x).detach())


def test_outputs_of_a_compiled_head(device: torch.device) -> None:
    """Outputs that leave the graph, and a loss outside of it."""
    head, x, target = make(device).eval(), data(device), hard_target(device)
    out = torch.compile(head, fullgraph=True, backend="aot_eager")(x, target)
    own = head(x, target)
    assert [y.requires_grad for y in out] == [y.requires_grad for y in own]
    losses = [GGAMLoss(0.7)(o, target) for o in (out, own)]
    found, expected = (parity.gradients(loss, x, head) for loss in losses)
    parity.assert_parity(found, expected, 1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("layout", "dtype", "tolerance"),
    [("nchw", torch.float32, 1e-4), ("channels_last", torch.bfloat16, 5e-3)],
    ids=["float32", "bfloat16"],
)
def test_numbers_by_inductor(
    layout: str, dtype: torch.dtype, tolerance: float, form: str, device: torch.device
) -> None:
    """Under autocast.  Inductor fuses the mean and dA with their neighbours, and does not round to bfloat16
    between them."""
    head, target = make(device), hard_target(device)
    x = data(device, layout=layout)

    def outcome(backend: str | None) -> Result:
        own = copy.deepcopy(head)
        whole = step_of(own, form)

        def step(x: Tensor) -> Tensor:
            return whole(torch.relu(x * 0.75 - 0.25).to(dtype), target)[0]

        step = step if backend is None else torch.compile(step, fullgraph=True, backend=backend)
        with torch.autocast(device.type, torch.bfloat16):
            loss = step(x)
        return {"loss": loss.detach(), **parity.gradients(loss, x, own), **dict(own.named_buffers())}

    assert_same(outcome("inductor"), outcome(None), tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_odd_widths(form: str, device: torch.device) -> None:
    """Nothing is a multiple of four, so that what is kept has gaps."""
    head = make(device, channels=33, classes=5, hidden_size=7, rd_channels=3)
    x = torch.rand(3, 33, 3, 3, device=device).requires_grad_()
    target = hard_target(device, 3, 5)
    assert_same(run(head, x, target, "aot_eager", form), run(head, x, target, form=form))


@pytest.mark.parametrize("form", FORMS)
def test_statistics_move_once(form: str, device: torch.device) -> None:
    head, x, target = make(device), data(device), hard_target(device)
    with torch.no_grad():  # a channel that is constant
        x[:, 3] = 0.5
    step = torch.compile(step_of(head, form), fullgraph=True, backend="aot_eager")
    for count in (1, 2, 3):
        step(x, target)[0].backward()
        assert [int(b) for n, b in head.named_buffers() if "tracked" in n] == [count, count]
    assert all((b >= 0).all() for n, b in head.named_buffers() if "var" in n)


@pytest.mark.parametrize("form", FORMS)
def test_one_compilation_for_every_batch_size(form: str, device: torch.device) -> None:
    head = make(device)
    inputs = dict(head.named_parameters())
    fast = torch.compile(step_of(head, form), fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (4, 7):
        x, target = data(device, n), hard_target(device, n)
        expected = run(head, x, target, form=form)
        with torch.compiler.set_stance("default" if n == 4 else "fail_on_recompile"):
            loss, out = fast(x, target)
        grads = torch.autograd.grad(loss, [x, *inputs.values()])
        named = dict(zip(("features", *inputs), grads, strict=True))
        found = {"loss": loss.detach(), **out._asdict(), **named, **dict(head.named_buffers())}
        assert_same(found, expected)


def test_weights_that_change(device: torch.device) -> None:
    """Numbers are arguments: of the operator, and of the recording."""
    head, x, target = make(device).eval(), data(device), hard_target(device)
    step = torch.compile(partial(loss_of, head), fullgraph=True, backend="aot_eager")
    for numbers in ((0.3, 0.0), (0.9, 0.2), (0.0, 0.3)):
        named = dict(zip(NUMBERS, numbers, strict=True))
        found, expected = step(x, target, **named), loss_of(head, x, target, **named)
        grads = [torch.autograd.grad(loss, [x, *head.parameters()]) for loss in (found, expected)]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    assert taken() == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ["both", "features", "parameters", "some", "nothing"])
def test_what_needs_a_gradient(what: str, form: str, device: torch.device) -> None:
    """The graphs hold one operator each way, and no dA or parameters' gradients that nobody asks for."""
    head, x, target = make(device), data(device), hard_target(device)
    if what in ("features", "nothing"):
        head.requires_grad_(False)
    if what in ("parameters", "nothing"):
        x = x.detach()
    if what == "some":
        head.fc1.requires_grad_(False)
        head.classifier[0].weight.requires_grad_(False)
    own = run(head, x, target, form=form)
    assert_same(run(head, x, target, "aot_eager", form), own)
    step, (there, back) = step_of(head, form), NAMES[form]
    forward, *backward = found = fake_cuda.graphs(lambda x, target: step(x, target)[0], x, target)
    assert operators(forward) == {there: 1}
    assert len(found) == 1 + (what != "nothing")
    for graph in backward:
        held = what == "features" and form == "fused"  # dA's factors are there already
        assert operators(graph) == ({} if held else {back: 1})
        made = [n for n in graph.graph.nodes if n.op == "call_function" and "ggam_fast" not in str(n.target)]
        values = [n.meta["val"] for n in made]
        large = [v for v in values if isinstance(v, Tensor) and v.numel() >= x.numel()]
        assert bool(large) == (what != "parameters")


@pytest.mark.parametrize("form", FORMS)
def test_gradients_can_be_asked_for_twice(form: str, device: torch.device) -> None:
    head, x, target = make(device), data(device), hard_target(device)
    loss, _ = torch.compile(step_of(head, form), fullgraph=True, backend="aot_eager")(x, target)
    first = parity.gradients(loss, x, head)  # which retains the graph
    again = parity.gradients(2 * loss, x, head)
    parity.assert_parity({k: v / 2 for k, v in again.items()}, first, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_may_be_changed_before_the_backward(form: str, device: torch.device) -> None:
    head, x, target = make(device, spatial_norm="sigmoid").eval(), data(device), hard_target(device)
    loss, out = torch.compile(step_of(head, form), fullgraph=True, backend="aot_eager")(x, target)
    with torch.no_grad():
        for y in out:
            y.zero_()
    expected = torch.autograd.grad(loss_of(head, x, target), x)[0]
    assert relative_error(torch.autograd.grad(loss, x)[0], expected) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("soft", [False, True])
def test_targets_that_are_not_dense(soft: bool, form: str, device: torch.device) -> None:
    target = soft_target(device, K, N).float().t() if soft else hard_target(device, 2 * N)[::2]
    assert not target.is_contiguous()
    head, x = make(device), data(device)
    assert_same(run(head, x, target, "aot_eager", form), run(head, x, target, form=form))


# ---- labels


@needs_cpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_labels_out_of_range(form: str, backend: str, device: torch.device) -> None:
    """In what Inductor writes; tests/test_labels.py has the other forms."""
    head, x = make(device, backend=backend, hidden_size=0), data(device)
    step = torch.compile(step_of(head, form), fullgraph=True)
    assert step(x, torch.tensor([0, 1, 0, 2]))[0].isfinite()
    for label in (-1, K, -100):
        with pytest.raises(RuntimeError, match=r"target must be in|index out of bounds"):
            step(x, torch.tensor([0, 1, label, 2]))


@pytest.mark.parametrize("form", FORMS)
def test_ignored_images(form: str, device: torch.device) -> None:
    """No loss, no gradient, no part in the mean."""
    head = make(device, ignore_index=-100).eval()
    x, target = data(device), torch.tensor([1, -100, 3, -100], device=device)
    loss, _ = torch.compile(step_of(head, form), fullgraph=True, backend="aot_eager")(x, target)
    (da,) = torch.autograd.grad(loss, x)
    some = x.detach()[::2].clone().requires_grad_()
    expected, _ = step_of(head, form)(some, target[::2])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(da[::2], torch.autograd.grad(expected, some)[0])
    assert not da[1::2].any()


# ---- what the operators do not take

NOT_TAKEN: dict[str, dict[str, Any]] = {
    "dropout": {"drop_rate": 0.4},
    "custom classifier": {"classifier": nn.Sequential(nn.Linear(C, 8), nn.GELU(), nn.Linear(8, K))},
    "maximum": {"pool_type": "max"},
    "half parameters": {"dtype": torch.bfloat16},
    "no bias": {"classifier": nn.Linear(C, K, bias=False)},
    "no affine norm": {"norm_layer": partial(nn.BatchNorm1d, affine=False)},
    "activation without a norm": {"norm_layer": nn.Identity},
    "no linear layer": {"classifier": nn.BatchNorm1d(C), "classes": C},
    "three norms": {
        "classifier": nn.Sequential(
            nn.BatchNorm1d(C),
            nn.Linear(C, 8),
            nn.BatchNorm1d(8),
            nn.ELU(),
            nn.BatchNorm1d(8),
            nn.Linear(8, K),
        )
    },
    "dense": {"pool_type": "flatten", "feat_size": (H, W)},
    "guidance differentiated": {"cam_detach": False},
    "hook": {},
    "subclass": {},
    "one position": {},
    "too many channels": {},
    "float64 target": {},
    "HIP": {},
}
TRACED = ("custom classifier", "hook")  # autograd's gradient


class Subclass(GGAMHead):
    """Which may do anything."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NOT_TAKEN)
def test_not_taken(name: str, form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled stage by stage, and right."""
    head = make(device, **copy.deepcopy(NOT_TAKEN[name]))
    x, target = data(device), hard_target(device)
    if name == "one position":
        x = x.detach()[:, :, :1, :1].clone().requires_grad_()
    elif name == "too many channels":
        monkeypatch.setattr(plan, "LARGEST_CHANNELS", C - 1)
    elif name == "float64 target":
        target = soft_target(device)
    elif name == "HIP":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    elif name == "hook":
        head.classifier[1].register_forward_hook(lambda module, given, y: y * 0.5)
    elif name == "subclass":
        head.__class__ = Subclass
    with torch._dynamo.config.patch(trace_autograd_ops=True) if name in TRACED else nullcontext():
        torch.manual_seed(0)  # for the same dropout
        found = run(head, x, target, "aot_eager", form)
    assert not taken(form)
    torch.manual_seed(0)
    monkeypatch.setattr(recorded, "enabled", False)
    assert_same(found, run(head, x, target, form=form), 2e-2 if "half" in name else 1e-4)


def test_logits_of_a_hidden_layer_are_not_taken(device: torch.device) -> None:
    head, x = make(device).eval(), data(device)
    hidden = torch.compile(partial(head, pre_logits=True), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(hidden, head(x, pre_logits=True))
    assert not taken("drop_in")


def test_an_exported_head_is_not_taken(device: torch.device) -> None:
    """Where the program is loaded, there may be no such operator."""
    head, x = make(device).eval(), data(device).detach()
    with torch.no_grad():
        program = torch.export.export(head, (x,))
    assert not any("_step" in str(n.target) for n in program.graph.nodes)


def test_a_batch_of_unknown_size_is_not_taken(device: torch.device) -> None:
    head, x, keep = make(device, hidden_size=0), data(device), torch.arange(N, device=device) % 2 == 0

    def some(x: Tensor, keep: Tensor) -> Tensor:
        return head(x[keep])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        found = torch.compile(some, fullgraph=True, backend="aot_eager")(x, keep)
        torch.testing.assert_close(found, some(x, keep))
    assert not taken("drop_in")


def test_a_mapped_head_is_not_taken(device: torch.device) -> None:
    head, x = make(device).eval(), data(device)
    mapped = torch.func.vmap(lambda image: head(image[None])[0])
    with torch.no_grad():
        found = torch.compile(mapped, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, head(x))
    assert not taken("drop_in")


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("form", FORMS)
def test_no_image(form: str, device: torch.device) -> None:
    found = run(make(device), data(device, 0), hard_target(device, 0), "aot_eager", form)
    assert not taken(form)
    assert found["loss"] == found["guidance_loss"] == 0


@pytest.mark.parametrize("form", FORMS)
def test_one_image_in_training_is_refused(form: str, device: torch.device) -> None:
    with pytest.raises(Exception, match="more than 1 value per channel"):
        run(make(device), data(device, 1), hard_target(device, 1), "aot_eager", form)


@pytest.mark.parametrize("form", FORMS)
def test_a_classifier_of_other_classes_is_refused(form: str, device: torch.device) -> None:
    head = make(device, classifier=nn.Linear(C, K - 1))
    with pytest.raises(Exception, match="classifier must return scores"):
        run(head, data(device), hard_target(device), "aot_eager", form)


# ---- what Inductor writes for a GPU

LARGE = (32, 2048, 14, 14)  # of smaller maps it splits the mean over more programs
TAILS = [("nchw", False), ("channels_last", False), ("channels_last", True)]


@pytest.fixture(scope="module")
def _code() -> None:
    if torch.cuda.is_available():
        pytest.skip("reads the code for a GPU that is not there")
    x = torch.rand(64, 64, requires_grad=True)
    try:
        programs = [fake_cuda.program(g) for g in fake_cuda.graphs(lambda x: torch.relu(x).sum(), x)]
    except Exception as error:
        pytest.skip(f"Inductor of torch {torch.__version__} gives no code for a fake GPU: {error!r}")
    assert [len(p.launches) > 0 for p in programs] == [True, True]


def tail_graphs(layout: str, training: bool, form: str) -> list[GraphModule]:
    """The end of a residual network, relu(bn(x) + y), and the head's loss: forward and backward."""
    head = GGAMHead(LARGE[1], K, hidden_size=8, backend="triton").train()
    norm = nn.BatchNorm2d(LARGE[1]).train(training)
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, y = (torch.empty(LARGE, dtype=torch.bfloat16, memory_format=order).requires_grad_() for _ in range(2))

    step = step_of(head, form)

    def loss(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return step(torch.relu(norm(x) + y), target)[0]

    return fake_cuda.graphs(loss, x, y, hard_target(x.device, LARGE[0]))


_lib = torch.library.Library("ggam_fast_tests", "DEF")
_lib.define("mean(Tensor x, int[] dims) -> Tensor")
_lib.define("same(Tensor x) -> Tensor")
torch.library.register_fake("ggam_fast_tests::mean", lambda x, dims: x.float().mean(dims), lib=_lib)
torch.library.register_fake("ggam_fast_tests::same", torch.empty_like, lib=_lib)
tests_ops = torch.ops.ggam_fast_tests


def hide(forward: GraphModule, backward: GraphModule) -> None:
    """Make the mean of A and dA operators that Inductor cannot look into."""
    (mean,) = forward.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim)
    mean.target, mean.args, mean.kwargs = tests_ops.mean.default, mean.args[:2], {}
    (chosen,) = [
        n for n in backward.graph.find_nodes(op="call_function", target=torch.ops.aten.where.self)
        if n.meta["val"].numel() == torch.Size(LARGE).numel()
    ]  # fmt: skip
    with backward.graph.inserting_before(chosen):
        seen = backward.graph.call_function(tests_ops.same.default, (chosen.args[2],))
    seen.meta["val"] = chosen.args[2].meta["val"]
    chosen.update_arg(2, seen)


def traffic(program: fake_cuda.Program) -> int:
    """How often buffers of A's size are read or written by Inductor's own kernels."""
    large = program.of_size(torch.Size(LARGE).numel())
    return sum(len(x.loads) + len(x.stores) for x in large if x.name.startswith("triton"))


@pytest.mark.usefixtures("_code")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("layout", "training"), TAILS)
def test_the_edges_of_a_step_are_fused(layout: str, training: bool, form: str) -> None:
    graphs = tail_graphs(layout, training, form)
    hidden = copy.deepcopy(graphs)
    there, back = map(fake_cuda.program, graphs)
    size = torch.Size(LARGE).numel()
    names = [f"ggam_fast.{name}" for name in NAMES[form]]

    # One kernel writes A (and the ReLU's mask) and computes its mean; nobody but the operator reads A.
    (step,) = [x for x in there.launches if x.name == names[0]]
    a, mean = step.loads[:2]
    assert there.sizes[a] == size
    assert [x.name for x in there.launches if a in x.loads] == names[:1]
    (writer,) = [x for x in there.launches if a in x.stores]
    assert mean in writer.stores
    assert len(there.of_size(size)) == 2 + training  # statistics of a batch are a read of their own

    # dA is nowhere in memory: what first has its size is the gradient behind the ReLU, which y needs.
    (grads,) = [x for x in back.launches if x.name == names[1]]
    first = next(x for x in back.of_size(size) if x.stores)
    given = graphs[1].graph.find_nodes(op="placeholder")
    masks = {n.name for n in given if n.meta["val"].dtype == torch.bool and n.meta["val"].numel() == size}
    if form == "drop_in":  # whose operator reads A, which is the mask where there is no other
        assert back.sizes[grads.loads[0]] == size
        readers = [x.name for x in back.launches if grads.loads[0] in x.loads]
        assert readers == ([names[1]] if masks else [names[1], first.name])
        masks.add(grads.loads[0])
    assert masks & {*first.loads}  # the ReLU's mask
    made = {b for x in back.of_size(size) for b in x.stores}
    assert len(made) == 2  # and the gradient of the norm's input
    ours = [x for x in back.launches if x.name.startswith("triton")]
    assert len(ours) <= (6 if form == "fused" else 8)
    if form == "drop_in":  # the cross entropy with the whole loss; back, and into the operator's gradient
        assert sum("log_softmax" in x.name for x in there.launches) == 1
        assert len(back.launches[: back.launches.index(grads)]) == 3

    # Where Inductor cannot see into them, it reads A once more and writes and reads dA.
    hide(*hidden)
    there_hidden, back_hidden = map(fake_cuda.program, hidden)
    readers = [x.name for x in there_hidden.launches if a in x.loads]
    assert readers == ["ggam_fast_tests.mean", names[0]]
    assert traffic(there_hidden) >= traffic(there)
    assert traffic(back_hidden) >= traffic(back) + 2


@pytest.mark.usefixtures("_code")
def test_labels_are_checked_on_a_gpu_too() -> None:
    head, x = GGAMHead(C, K, hidden_size=0, backend="torch"), torch.rand(N, C, H, W)
    forward = fake_cuda.graphs(partial(loss_of, head), x.requires_grad_(), hard_target(x.device))[0]
    assert "tl.device_assert(tmp" in fake_cuda.code(forward)
