"""torch.compile(fullgraph=True) and torch.export: the same numbers as eager, no graph break."""

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ggam_fast import GGAMHead, GGAMLoss, GGAMOutput, functional, presets
from tests.parity import relative_error

C, K, N, SIZE = 32, 6, 4, 5
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {**presets.PAPER, "hidden_size": 16},
    "unit_mean": {"hidden_size": 16},
    "unit_mean_channel": {"hidden_size": 16, "attention": "channel", "pool_type": "max"},
    "release": {**presets.RELEASE, "hidden_size": 16},
    "second_order": {"cam_detach": False, "hidden_size": 16, "cam_norm": "standardized"},
    "flatten": {"pool_type": "flatten", "feat_size": SIZE, "hidden_size": 16},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """A convolution, the head and the loss: what a training step compiles."""

    def __init__(self, head: GGAMHead) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, C, 1), nn.ReLU())
        self.head, self.criterion = head, GGAMLoss(0.3)

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        out = self.head(self.backbone(images), target)
        return self.criterion(out, target), out.cam_weights


def batch(device: torch.device, n: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, SIZE, SIZE, device=device), torch.randint(K, (n,), device=device)


def step(run: Callable[..., Any], model: Model, images: Tensor, target: Tensor) -> list[Tensor]:
    """One forward and backward: loss, beta, all gradients, batch-norm statistics."""
    model.zero_grad()
    loss, beta = run(images, target)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(list(model.parameters()))
    return [loss, beta, *grads, *model.buffers()]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    largest = max(float(e.detach().double().norm()) for e in expected)
    for a, b in zip(found, expected, strict=True):
        difference = float((a.detach().double() - b.detach().double()).norm())
        assert difference <= tolerance * float(b.detach().double().norm()) + 1e-7 * largest, relative_error(
            a, b
        )


def check(head: GGAMHead, device: torch.device, backend: str, dynamic: bool | None = None) -> None:
    # The mean of A is then torch's, rounded otherwise.
    tolerance = 1e-4 if head.backend == "triton" else 1e-5
    eager = Model(head).to(device).train()
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (N, N + 1) if dynamic else (N,):
        images, target = batch(device, n)
        assert_same(step(run, compiled, images, target), step(eager, eager, images, target), tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_training_step(name: str, device: torch.device) -> None:
    check(GGAMHead(C, K, **OPTIONS[name]), device, "aot_eager")


@pytest.mark.parametrize("name", ["paper", "unit_mean", pytest.param("release", marks=pytest.mark.slow)])
def test_training_step_by_inductor(name: str, device: torch.device) -> None:
    check(GGAMHead(C, K, **OPTIONS[name]), device, "inductor")


@pytest.mark.parametrize("name", OPTIONS)
def test_training_step_on_kernels(name: str, device: torch.device) -> None:
    check(GGAMHead(C, K, **{**OPTIONS[name], "backend": "triton"}), device, "aot_eager")


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_image(channels_last: bool, device: torch.device) -> None:
    """Whose sums and layers are written otherwise for the compiler."""
    head = GGAMHead(C, K, hidden_size=16, backend="torch").to(device).eval()
    exact = copy.deepcopy(head).double()
    x, target = torch.randn(1, C, SIZE, SIZE, device=device), torch.tensor([2], device=device)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        found = torch.compile(head, fullgraph=True, backend="aot_eager")(x, target)
        assert_same(list(found), list(exact(x.double(), target)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_any_batch_size(backend: str, device: torch.device) -> None:
    head = GGAMHead(C, K, hidden_size=16, backend=backend)
    check(head, device, "aot_eager", dynamic=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_fused_step_is_not_compiled_for_every_batch_size(
    backend: str, reduction: str, device: torch.device
) -> None:
    head = GGAMHead(C, K, hidden_size=16, backend=backend, guidance_reduction=reduction).to(device)
    counter = CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return functional.fused_ggam_loss(head, x, target, guidance_weight=0.7).loss

    step = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for n in (3, 4, 5, 7, 9, 11, 40, 50):
        x = torch.rand(n, C, SIZE, SIZE, device=device).requires_grad_()
        target = torch.randint(K, (n,), device=device)
        state = copy.deepcopy(head.state_dict())
        found = torch.autograd.grad(step(x, target), x)[0]
        head.load_state_dict(state)
        assert relative_error(found, torch.autograd.grad(loss(x, target), x)[0]) < 1e-4
    assert counter.frame_count <= 2  # again where the first N equals another size of the step


@pytest.mark.parametrize("cam_detach", [True, False])
def test_custom_classifier(cam_detach: bool, device: torch.device) -> None:
    """Its gradient is autograd's, which a compiled step traces with this switch alone."""
    own = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 12), nn.GELU(), nn.Linear(12, K))
    head = GGAMHead(C, K, classifier=own, cam_detach=cam_detach)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        check(head, device, "aot_eager")


@pytest.mark.parametrize("options", [{"act_layer": nn.GELU}, {"norm_layer": nn.LayerNorm}], ids=str)
def test_custom_classifier_breaks_the_graph_without_that_switch(options: Any, device: torch.device) -> None:
    head = GGAMHead(C, K, hidden_size=8, **options).to(device).train()
    criterion = GGAMLoss(0.3)
    target = torch.randint(K, (N,), device=device)

    def modular(x: Tensor) -> Tensor:
        return criterion(head(x, target), target)

    def fused(x: Tensor) -> Tensor:
        return functional.fused_ggam_loss(head, x, target, guidance_weight=0.3).loss

    for step in (modular, fused):
        x = torch.rand(N, C, SIZE, SIZE, device=device, requires_grad=True)
        inputs = [x, *head.parameters()]
        found = torch.autograd.grad(torch.compile(step, backend="aot_eager")(x), inputs)
        for ours, expected in zip(found, torch.autograd.grad(step(x), inputs), strict=True):
            assert relative_error(ours, expected) < 1e-4


@pytest.mark.parametrize("cam_detach", [True, False])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(where: str, cam_detach: bool, device: torch.device) -> None:
    """Inside the compiled function autocast changes nothing in the head. Around it, AOTAutograd runs the
    whole backward under it (`torch._functorch.config.backward_pass_autocast`), the classifier's included."""
    head = GGAMHead(C, K, hidden_size=0, cam_detach=cam_detach).to(device).train()
    criterion = GGAMLoss(0.3)
    x = torch.rand(N, C, SIZE, SIZE, device=device)
    target = torch.randint(K, (N,), device=device)

    def plain(x: Tensor) -> Tensor:
        return criterion(head(x, target), target)

    def under_autocast(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16):
                return function(x)

        return forward

    def gradients(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        return list(torch.autograd.grad(function(leaf), [leaf, *head.parameters()]))

    def compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    exact = gradients(plain)
    if where == "inside":
        assert_same(gradients(compiled(under_autocast(plain))), exact)
    else:
        assert_same(gradients(under_autocast(compiled(plain))), exact, 2e-2)
    assert_same(gradients(under_autocast(plain)), exact)


def test_export_of_a_custom_classifier_with_a_target_is_refused(device: torch.device) -> None:
    head = GGAMHead(C, K, classifier=nn.Sequential(nn.Linear(C, K), nn.Tanh())).to(device).eval()
    inputs = torch.rand(N, C, SIZE, SIZE, device=device), torch.randint(K, (N,), device=device)
    with pytest.raises(Exception, match="export the head without target"):
        torch.export.export(head, inputs, strict=False)


def test_second_derivatives_of_the_contractions(device: torch.device) -> None:
    """Dynamo gives zeros for those of an autograd Function."""
    a, w = torch.randn(2, 4, 9, device=device), torch.rand(2, 9, device=device)

    def penalty(x: Tensor) -> Tensor:
        def score(y: Tensor) -> Tensor:
            s = functional.spatial_sum(y, w, input_fmt="NLC", backend="torch")
            return functional.channel_sum(y, s, input_fmt="NLC", backend="torch").pow(3).sum()

        return torch.func.grad(score)(x).square().sum()

    a = a.transpose(1, 2).contiguous()
    expected = torch.func.grad(penalty)(a)
    assert expected.norm() > 0
    found = torch.compile(torch.func.grad(penalty), fullgraph=True, backend="aot_eager")(a)
    assert relative_error(found, expected) < 1e-5


def test_soft_targets_and_inference(device: torch.device) -> None:
    head = GGAMHead(C, K, hidden_size=16).to(device).eval()
    x = torch.rand(N, C, SIZE, SIZE, device=device)
    target = torch.rand(N, K, device=device).softmax(1)
    run = torch.compile(head, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(list(run(x, target)), list(head(x, target)))
    with torch.inference_mode():
        assert_same([run(x)], [head(x)])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("pool_type", ["avg", "flatten"])
def test_export(backend: str, pool_type: str, device: torch.device) -> None:
    """The evaluation forward, batch size left open."""
    head = GGAMHead(C, K, hidden_size=16, backend=backend, pool_type=pool_type, feat_size=SIZE)
    head = head.to(device).eval()
    x = torch.rand(N, C, SIZE, SIZE, device=device)
    dynamic = {"features": {0: torch.export.Dim("batch", min=2, max=64)}}
    with torch.no_grad():
        program = torch.export.export(head, (x,), dynamic_shapes=dynamic)
        other = torch.rand(N + 3, C, SIZE, SIZE, device=device)
        for given in (x, other):
            torch.testing.assert_close(program.module()(given), head(given))


def test_one_exported_image_is_not_written_out_as_a_sum(device: torch.device) -> None:
    """A program that nothing fuses: its products of A and a map would be in memory."""
    head = GGAMHead(C, K, hidden_size=16, backend="torch").to(device).eval()
    x = torch.rand(1, C, SIZE, SIZE, device=device)
    with torch.no_grad():
        program = torch.export.export(head, (x, torch.tensor([1], device=device)))
    written = [n for n in program.graph.nodes if n.op == "call_function" and "mul" in str(n.target)]
    assert written
    if device.type == "cpu":
        assert all(n.meta["val"].numel() < x.numel() for n in written)


@pytest.mark.parametrize("name", ["channel_sum", "spatial_sum", "head"])
def test_a_batch_of_unknown_size(name: str, device: torch.device) -> None:
    """As a mask leaves it."""
    head = GGAMHead(C, K, hidden_size=0, backend="torch").to(device)
    x, keep = torch.rand(N, C, SIZE, SIZE, device=device), torch.arange(N, device=device) % 2 == 0
    weights = torch.rand((N, C) if name == "channel_sum" else (N, SIZE, SIZE), device=device)

    def some(x: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
        return head(x[keep]) if name == "head" else getattr(functional, name)(x[keep], weights[keep])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        found = torch.compile(some, fullgraph=True, backend="aot_eager")(x, weights, keep)
        torch.testing.assert_close(found, some(x, weights, keep))


def test_an_exported_guided_head_can_be_saved(device: torch.device) -> None:
    head = GGAMHead(C, K, hidden_size=16, device=device).eval()
    given = torch.rand(N, C, SIZE, SIZE, device=device), torch.arange(N, device=device) % K
    file = io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(head, given), file)
        file.seek(0)
        found = torch.export.load(file).module()(*given)
        assert isinstance(found, GGAMOutput)
        torch.testing.assert_close(found, head(*given))
