"""GGAMHead against its eager reference, option by option, and the promises a head makes around them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import ggam_fast.head
import ggam_fast.step
from ggam_fast import GGAMHead, GGAMLoss, GGAMOutput, checks
from ggam_fast.guidance import kl_guidance
from ggam_fast.norm import SettlingBatchNorm1d
from ggam_fast.reference import GGAMHeadReference
from tests.parity import (
    OPTIONS,
    C,
    H,
    K,
    N,
    W,
    as_format,
    assert_parity,
    combine,
    draws,
    features,
    gradients,
    hard_target,
    pair,
    relative_error,
    soft_target,
)

LAYOUTS = ("nchw", "channels_last", "sliced", "transposed")


class MapClassifier(nn.Module):
    """A user's own module on the attended map, of layers without a closed form."""

    def __init__(self, input_fmt: str = "NCHW") -> None:
        super().__init__()
        self.input_fmt = input_fmt
        self.norm = nn.LayerNorm(C)
        self.out = nn.Linear(C, K)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_fmt == "NCHW":
            x = x.permute(0, 2, 3, 1)
        return self.out(F.gelu(self.norm(x.flatten(1, -2))).square().mean(1))


def pooled_classifier() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 10), nn.GELU(), nn.Linear(10, K))


def layer_norm_head(**options: Any) -> dict[str, Any]:
    return {**options, "norm_layer": nn.LayerNorm, "act_layer": nn.GELU}


AXES = {
    **OPTIONS,
    "training": (True, False),
    "soft": (True, False),
    "layout": LAYOUTS,
    "input_fmt": ("NCHW", "NCHW", "NHWC", "NLC"),
}
HEADS: dict[str, dict[str, Any]] = {
    "avg-hidden": {"pool_type": "avg", "hidden_size": 10},
    "avg-linear": {"pool_type": "avg", "hidden_size": 0},
    "max-hidden": {"pool_type": "max", "hidden_size": 10},
    "max-linear": {"pool_type": "max", "hidden_size": 0},
    "flatten-hidden": {"pool_type": "flatten", "hidden_size": 10, "feat_size": (H, W)},
    "flatten-linear": {"pool_type": "flatten", "hidden_size": 0, "feat_size": (H, W)},
    "avg-layernorm": layer_norm_head(pool_type="avg", hidden_size=10),
    "max-own": {"pool_type": "max", "build_classifier": pooled_classifier},
    "map-own": {"pool_type": ""},
}
CASES = [
    pytest.param(head, {**HEADS[head], **draw}, id=f"{head}-{i}")
    for head in HEADS
    for i, draw in enumerate(draws(AXES, 24, head))
]


def compare(
    options: dict[str, Any], device: torch.device, backend: str = "torch", second: bool = True
) -> None:
    """Outputs, gradients and second-order gradients of a head and of the reference."""
    options = dict(options)
    training, soft, layout = options.pop("training"), options.pop("soft"), options.pop("layout")
    if options["pool_type"] == "":
        options["build_classifier"] = lambda: MapClassifier(options["input_fmt"])
    head, reference = pair(device=device, backend=backend, **options)
    tolerance, dtype = 1e-10, torch.float64
    if backend == "triton":
        head, tolerance, dtype = head.float(), 1e-4, torch.float32
    if dtype != torch.float64 and device.type != "cpu":
        head.drop.p = reference.drop.p = 0.0  # a GPU draws another mask for float64
    target = soft_target(device) if soft else hard_target(device)
    base = features(device, layout=layout)
    if training and not options["cam_detach"] and any(isinstance(m, nn.BatchNorm1d) for m in head.modules()):
        second = False  # the loss is of second order then, and torch's batch norm ends there
    found: list[Any] = []
    for module, x in ((head, base.to(dtype).double().to(dtype)), (reference, base.to(dtype).double())):
        module.train(training)
        leaf = x.requires_grad_()
        torch.manual_seed(7)  # one dropout mask for both
        out = module(as_format(leaf, options["input_fmt"]), target)
        first = gradients(combine(out), leaf, module)
        graph, higher = {}, {}
        if second:  # another path: the fused backward has no derivative, the contractions do
            graph = gradients(combine(out), leaf, module, create_graph=True)
            if any(g.requires_grad for g in graph.values()):
                higher = gradients(sum(combine(g, 3) for g in graph.values()), leaf, module)  # type: ignore[arg-type]
        found.append((out, first, graph, higher, dict(module.named_buffers())))
    for mine, theirs in zip(*found, strict=True):
        assert_parity(mine, theirs, tolerance)


@pytest.mark.parametrize(("head", "options"), CASES)
def test_matches_the_reference(head: str, options: dict[str, Any], device: torch.device) -> None:
    compare(options, device)


@pytest.mark.parametrize(("head", "options"), [c for c in CASES if c.id.endswith(("-0", "-1"))])
def test_kernels_match_the_reference(head: str, options: dict[str, Any], device: torch.device) -> None:
    compare(options, device, backend="triton", second=False)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("cam_detach", [True, False])
def test_a_soft_target_can_be_learned(cam_detach: bool, own: bool, device: torch.device) -> None:
    """Through beta, where it is not constant: y is the target's mean of the scores."""
    build = (lambda: nn.Sequential(nn.Linear(C, 8), nn.GELU(), nn.Linear(8, K))) if own else None
    heads = pair(
        device=device, hidden_size=0, cam_detach=cam_detach, cam_norm="standardized", build_classifier=build
    )
    x, target = features(device), soft_target(device)
    found, expected = (
        torch.autograd.grad(h(x, t).guidance_loss + 0.0 * t.sum(), t)[0]
        for h in heads
        for t in [target.clone().requires_grad_()]
    )
    assert bool(expected.any()) != cam_detach
    torch.testing.assert_close(found, expected)


BACKENDS = ("torch", "triton")
POOLS = {
    "avg": {"pool_type": "avg"},
    "max": {"pool_type": "max"},
    "flatten": {"pool_type": "flatten", "feat_size": (H, W)},
    "map": {"pool_type": "", "build_classifier": MapClassifier},
}


def poolings(**common: Any) -> Any:
    cases = [pytest.param({**common, **options}, id=name) for name, options in POOLS.items()]
    return pytest.mark.parametrize("options", cases)


# Half precision


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


# Autocast and mixed types


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


# Layouts, gradients' layouts, copies


@pytest.mark.parametrize("input_fmt", checks.INPUT_FMT)
def test_dense_layouts_are_views(input_fmt: str) -> None:
    for x in (features(torch.device("cpu")), features(torch.device("cpu"), layout="channels_last")):
        given = as_format(x, input_fmt)
        seen = checks.feature_map(given, input_fmt).features
        assert seen.data_ptr() == given.data_ptr()
        assert seen.shape == (N, C, H * W)
        assert torch.equal(seen, x.flatten(2))


class CountCopies(TorchDispatchMode):
    """Counts the operators that copy a tensor of the size of the features."""

    NAMES = ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous", "aten::_reshape_copy")

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.seen = numel, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name in self.NAMES and isinstance(out, Tensor) and out.numel() == self.numel:
            self.seen.append(func._schema.name)
        return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool_type", ["avg", "max"])
@pytest.mark.parametrize(
    ("layout", "copies"), [("nchw", 0), ("channels_last", 0), ("sliced", 0), ("transposed", 1)]
)
def test_copies_of_the_features(
    layout: str, copies: int, pool_type: str, backend: str, device: torch.device
) -> None:
    head, _ = pair(device=device, backend=backend, hidden_size=0, pool_type=pool_type)
    head, target = head.float(), hard_target(device)
    x = features(device, torch.float32, layout).requires_grad_()
    with CountCopies(x.numel()) as counter:
        out = head(x, target)
        forward = len(counter.seen)
        torch.autograd.grad(out.guidance_loss + out.logits.sum(), x)
    assert forward == copies, counter.seen
    if copies == 0:
        assert counter.seen == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@poolings(hidden_size=10)
def test_gradient_has_the_layout_of_the_features(
    options: dict[str, Any], layout: str, backend: str, device: torch.device
) -> None:
    head, _ = pair(device=device, backend=backend, **options)
    x = features(device, torch.float32, layout).requires_grad_()
    out = head.float()(x, hard_target(device))
    (grad,) = torch.autograd.grad(out.logits.square().sum(), x)
    assert grad.stride() == x.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["random", "sum", "channels_last"])
@poolings(hidden_size=0)
def test_any_incoming_gradient(
    options: dict[str, Any], kind: str, backend: str, device: torch.device
) -> None:
    """`.sum()` hands back an expanded gradient of stride 0; a convolution may hand back channels-last."""
    attended = (
        {**options, "pool_type": "", "build_classifier": nn.Identity} if kind == "channels_last" else options
    )
    head, reference = pair(device=device, backend=backend, **attended)
    x = features(device)
    found = []
    for module, leaf in ((head.float(), x.float()), (reference, x)):
        leaf = leaf.clone().requires_grad_()
        y = module(leaf)
        if kind == "sum":
            y.sum().backward()
        else:
            torch.manual_seed(3)
            g = torch.randn(y.shape, device=device, dtype=torch.float64).to(y.dtype)
            if y.dim() == 4:
                g = g.contiguous(memory_format=torch.channels_last)
            y.backward(g)
        found.append(leaf.grad)
    assert relative_error(*found) < 1e-4


# Reproducibility, independence of images, numbers that are not


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
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("spatial_norm", OPTIONS["spatial_norm"])
@poolings(hidden_size=10)
def test_non_finite_values_stay_in_their_image(
    options: dict[str, Any], spatial_norm: str, bad: float, backend: str, device: torch.device
) -> None:
    head, _ = pair(device=device, backend=backend, spatial_norm=spatial_norm, **options)
    head, x, target = head.float().eval(), features(device).float(), hard_target(device)
    broken = x.clone()
    broken[1, 2, 1, 1] = bad
    runs = []
    for features_ in (x, broken):
        leaf = features_.clone().requires_grad_()
        out = head(leaf, target)
        loss = GGAMLoss(0.5)(out, target)
        runs.append((*out[:4], torch.autograd.grad(loss, leaf)[0]))
    others = [0, 2, 3]
    for clean, found in zip(*runs, strict=True):
        assert torch.equal(clean[others], found[others])
    assert not runs[1][0][1].isfinite().all()


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


# What runs, how often, and what stays behind


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


@pytest.mark.parametrize("value", [1 / 3, 1e-7])
def test_a_flat_beta_is_standardized_to_zero(value: float, device: torch.device) -> None:
    head, reference = pair(1000, K, device=device, cam_norm="standardized")
    log_s = torch.randn(2, 1000, dtype=torch.float64, device=device).log_softmax(1)
    beta = torch.full_like(log_s, value)  # the mean of 1,000 of them rounds
    found = kl_guidance(log_s, beta, head.cam_norm, 1.0, head.divergence).mean()
    torch.testing.assert_close(found, kl_guidance(log_s, 0 * beta, "sigmoid", 1.0, head.divergence).mean())
    torch.testing.assert_close(reference.guidance(log_s, beta), found)


@poolings(hidden_size=10)
def test_eval_logits_are_those_of_the_guided_forward(options: dict[str, Any], device: torch.device) -> None:
    head, _ = pair(device=device, **options)
    x, target = features(device), hard_target(device)
    head.eval()
    assert torch.equal(head(x), head(x, target).logits)


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


def test_a_channel_mlp_that_would_have_to_be_called_is_refused(device: torch.device) -> None:
    """Its weights are read: what hooks or another forward do would be lost, silently."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed, self.bias = nn.Parameter(torch.ones(4, C)), nn.Parameter(torch.ones(4))

    replaced, quantised = (GGAMHead(C, K, rd_channels=4, device=device) for _ in range(2))
    replaced.fc2 = Doubled(4, C, device=device)
    quantised.fc1 = Quantised().to(device)
    x = features(device, torch.float32)
    for parameter in ("weight", "bias"):
        pruned = GGAMHead(C, K, rd_channels=4, device=device)
        prune.random_unstructured(pruned.fc1, parameter, 0.5)
        with pytest.raises(
            TypeError, match=r"fc1 must be a plain nn.Linear.*Linear with parameters that a hook"
        ):
            pruned(x)
    with pytest.raises(TypeError, match=r"fc1 must be.*got Quantised with a forward of its own"):
        quantised(x)
    with pytest.raises(TypeError, match=r"fc2 must be.*got Doubled with a forward of its own"):
        replaced(x)
    watched = GGAMHead(C, K, rd_channels=4, device=device)
    watched.fc1.register_forward_pre_hook(lambda *_: None)
    assert watched(x).shape == (x.shape[0], K)


def test_a_classifier_set_by_hand_can_be_reset(device: torch.device) -> None:
    head = GGAMHead(C, K, hidden_size=10, device=device)
    head.classifier = nn.Linear(C, K, device=device)
    head.reset(K + 1)
    assert head(features(device, torch.float32)).shape[1] == K + 1


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


def test_frozen_parameters_guide_the_features(device: torch.device) -> None:
    head, reference = pair(device=device, hidden_size=0)
    x, target = features(device), hard_target(device)
    found = []
    for module in (head.requires_grad_(False), reference.requires_grad_(False)):
        leaf = x.clone().requires_grad_()
        found.append(gradients(combine(module(leaf, target)), leaf, module))
    assert_parity(*found, 1e-10)


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


@pytest.mark.parametrize("backend", BACKENDS)
@poolings(hidden_size=10)
def test_one_image(options: dict[str, Any], backend: str, device: torch.device) -> None:
    head, reference = pair(device=device, backend=backend, **options)
    x, target = features(device, n=1), hard_target(device, 1)
    head, reference = head.float().eval(), reference.eval()
    assert_parity(head(x.float(), target), reference(x, target), 1e-5)


def test_one_image_has_no_batch_statistics(device: torch.device) -> None:
    head, _ = pair(device=device, hidden_size=10)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        head.train()(features(device, n=1), hard_target(device, 1))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (14, 14)])
@pytest.mark.parametrize("channels", [1, 2, 65])
def test_other_sizes(shape: tuple[int, int], channels: int, device: torch.device) -> None:
    head, reference = pair(channels, 3, device=device, rd_channels=1, hidden_size=0)
    x, target = torch.rand(2, channels, *shape, device=device, dtype=torch.float64), hard_target(device, 2, 3)
    found = []
    for module in (head, reference):
        leaf = x.clone().requires_grad_()
        out = module(leaf, target)
        found.append({**out._asdict(), **gradients(combine(out), leaf, module)})
    assert_parity(*found, 1e-10)


def test_shapes_follow_the_input_format(device: torch.device) -> None:
    x, target = features(device), hard_target(device)
    shapes = {"NCHW": (N, H, W), "NHWC": (N, H, W), "NLC": (N, H * W)}
    for input_fmt, shape in shapes.items():
        head, _ = pair(device=device, input_fmt=input_fmt, hidden_size=0)
        assert head(as_format(x, input_fmt), target).spatial_attention.shape == shape
    plain = GGAMHead(C, 0, pool_type="", input_fmt="NHWC").to(device, torch.float64)
    assert plain(as_format(x, "NHWC")).shape == (N, H, W, C)


def test_ranges(device: torch.device) -> None:
    head, _ = pair(device=device, hidden_size=10)
    out = head(features(device), soft_target(device))
    assert isinstance(out, GGAMOutput)
    assert (out.channel_attention > 0).all()
    one = torch.ones(N, device=device, dtype=torch.float64)
    torch.testing.assert_close(out.channel_attention.sum(1), one)
    torch.testing.assert_close(out.spatial_attention.sum((1, 2)), one)
    assert out.guidance_loss >= 0
    assert not out.cam_weights.requires_grad


# timm's surface


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
def test_no_classes(kind: type[nn.Module], device: torch.device) -> None:
    x = features(device)
    for options, width in (({"hidden_size": 10}, 10), ({"hidden_size": 0}, C), ({"hidden_size": None}, C)):
        head = kind(C, 0, **options).to(device, torch.float64).eval()
        assert head.num_features == width
        assert head(x).shape == (N, width)
        with pytest.raises(ValueError, match="num_classes=0"):
            head(x, hard_target(device))
    attended = kind(C, 0, pool_type="").to(device, torch.float64)
    assert attended(x).shape == x.shape


@pytest.mark.parametrize("name", HEADS)
def test_pre_logits_is_what_the_last_layer_gets(name: str, device: torch.device) -> None:
    options = HEADS[name]
    if options["pool_type"] == "":
        options = {**options, "build_classifier": MapClassifier}
    head, reference = pair(device=device, **options)
    head.eval(), reference.eval()
    x = features(device)
    found = head(x, pre_logits=True)
    assert relative_error(found, reference(x, pre_logits=True)) < 1e-10
    layers = head.classifier
    last = layers[-1] if isinstance(layers, nn.Sequential) else layers
    assert relative_error(last(found), head(x)) < 1e-10
    if "build_classifier" not in options:
        assert found.shape == (N, head.num_features)


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
def test_reset_keeps_what_fits(kind: type[GGAMHead], device: torch.device) -> None:
    head = kind(C, K, hidden_size=10, feat_size=(H, W)).to(device, torch.float64).eval()
    x = features(device)
    before = head(x, pre_logits=True)
    head.reset(3)
    assert head(x).shape == (N, 3)
    assert torch.equal(head(x, pre_logits=True), before)
    head.reset(0)
    assert torch.equal(head(x), before)
    head.reset(4, "max")
    assert head(x, hard_target(device, k=4)).logits.shape == (N, 4)
    head.reset(5, "flatten")
    assert head(x).shape == (N, 5)
    head.reset(2, "avg", reset_other=True)
    assert isinstance(head.classifier, nn.Linear)
    assert head(x).shape == (N, 2)
    head.reset(0, "")
    assert head(x).shape == x.shape
    assert not any(m.training for m in head.modules())
    assert {p.dtype for p in head.parameters()} == {torch.float64}


def test_reset_replaces_a_custom_classifier(device: torch.device) -> None:
    own = nn.Sequential(nn.Linear(C, 8), nn.ReLU(), nn.Identity(), nn.Identity(), nn.Linear(8, K))
    head = GGAMHead(C, K, classifier=own).to(device, torch.float64)
    assert head.num_features == C
    head.reset(3)
    assert head.num_features == 512
    assert head(features(device)).shape == (N, 3)


@pytest.mark.parametrize("arguments", [(7, "bogus"), (7, ""), (-1,), (7, "flatten")])
def test_reset_that_fails_changes_nothing(arguments: tuple[Any, ...], device: torch.device) -> None:
    head = GGAMHead(C, K, hidden_size=10).to(device, torch.float64).eval()
    x, before = features(device), copy.deepcopy(head.state_dict())
    expected = head(x)
    with pytest.raises(ValueError, match=r"pool_type|num_classes|feat_size"):
        head.reset(*arguments)
    assert torch.equal(head(x), expected)
    assert head.num_classes == K
    assert head.pool_type == "avg"
    assert list(before) == list(head.state_dict())


def test_meta_device() -> None:
    head = GGAMHead(C, K, device="meta")
    out = head(torch.empty(2, C, H, W, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"))
    assert out.logits.shape == (2, K)
    assert out.logits.is_meta


def test_built_of_fake_tensors() -> None:
    """As tools do that count parameters without their memory."""
    with FakeTensorMode():
        head = GGAMHead(C, K, hidden_size=8)
        assert head(torch.empty(2, C, 3, 3)).shape == (2, K)


def test_device_and_dtype_of_the_parameters(device: torch.device) -> None:
    head = GGAMHead(C, K, device=device, dtype=torch.float16)
    floats = [t for t in (*head.parameters(), *head.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float16}
    assert {t.device.type for t in floats} == {device.type}
    out = head(features(device).half(), hard_target(device))
    out.logits.sum().backward()
    assert head.fc1.weight.grad is not None
    assert head.fc1.weight.grad.dtype == torch.float16
