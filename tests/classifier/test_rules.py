"""v = d y / d pooled: each layer's rule against torch's own module and autograd."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ggam_fast.classifier.layers import known_layers, read
from ggam_fast.classifier.rules import run, scores
from ggam_fast.norm import SettlingBatchNorm1d
from tests.parity import N, relative_error

WIDTH = 7


def without_weight(layer: nn.BatchNorm1d) -> nn.BatchNorm1d:
    layer.weight = None  # type: ignore[assignment]
    return layer


def with_one_activation(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 5), act, nn.Linear(5, 4), act, nn.Linear(4, 3))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, 3),
    "linear_without_bias": lambda: nn.Linear(WIDTH, 3, bias=False),
    "batch_norm": lambda: nn.BatchNorm1d(WIDTH),
    "batch_norm_plain": lambda: nn.BatchNorm1d(WIDTH, affine=False),
    "batch_norm_untracked": lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
    "batch_norm_cumulative": lambda: nn.BatchNorm1d(WIDTH, momentum=None),
    "batch_norm_settling": lambda: SettlingBatchNorm1d(WIDTH),
    "batch_norm_settling_plain": lambda: SettlingBatchNorm1d(WIDTH, affine=False, momentum=None),
    "batch_norm_settling_untracked": lambda: SettlingBatchNorm1d(WIDTH, track_running_stats=False),
    "batch_norm_bias_alone": lambda: without_weight(nn.BatchNorm1d(WIDTH)),
    "elu": lambda: nn.ELU(alpha=0.7),
    "elu_in_place": lambda: nn.ELU(inplace=True),
    "relu": nn.ReLU,
    "relu_in_place": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.4),
    "identity": nn.Identity,
    "repeated": lambda: with_one_activation(nn.ReLU()),
    "chain": lambda: nn.Sequential(
        nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 5), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm1d(5), nn.ELU(),
        nn.Linear(5, 3),
    ),
    "norms_and_activations": lambda: nn.Sequential(
        SettlingBatchNorm1d(WIDTH), nn.ELU(alpha=0.6), nn.BatchNorm1d(WIDTH, affine=False), nn.ReLU(),
        nn.Linear(WIDTH, 3), SettlingBatchNorm1d(3),
    ),
}  # fmt: skip


def shaken(module: nn.Module) -> nn.Module:
    """Parameters and statistics away from the ones and zeros they start with."""
    module = module.double()
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if t.is_floating_point():
                t.add_(torch.rand_like(t) if "var" in name else torch.randn_like(t) * 0.3)
    return module


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_rule_is_torchs_layer(name: str, training: bool, device: torch.device) -> None:
    """Output, statistics, v, and autograd's gradient of v itself."""
    theirs = shaken(LAYERS[name]()).to(device).train(training)
    ours = copy.deepcopy(theirs)
    layers = known_layers(ours, nn.Dropout(0.0))
    assert layers is not None
    x = torch.randn(N, WIDTH, dtype=torch.float64, device=device, requires_grad=True)

    torch.manual_seed(1)
    found = scores(layers, x, False, "torch")
    torch.manual_seed(1)
    expected = theirs(x.clone())
    assert relative_error(found.logits, expected) < 1e-12
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)

    seed = torch.randn_like(expected)
    (v,), _ = found.pull_back([seed])
    (gradient,) = torch.autograd.grad(expected, x, seed, create_graph=True)
    assert relative_error(v, gradient) < 1e-12
    if v.requires_grad and name not in ("chain", "norms_and_activations"):
        parameters = [x, *ours.parameters()], [x, *theirs.parameters()]
        again = [
            torch.autograd.grad(g.sin().sum(), inputs, allow_unused=True, materialize_grads=True)
            for g, inputs in zip((v, gradient), parameters, strict=True)
        ]
        for a, b in zip(*again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_two_gradients_at_once(name: str, training: bool, graph: bool, device: torch.device) -> None:
    """By torch's own backward operations: two v, and the parameters' gradients for the last of them; of
    scores with a graph, and of those that autograd does not look into."""
    if name == "batch_norm_bias_alone" and device.type == "cuda":
        pytest.skip("torch's autograd, the yardstick, fails there (2.11)")
    theirs = shaken(LAYERS[name]()).to(device).train(training)
    module = copy.deepcopy(theirs)
    layers = known_layers(module, nn.Dropout(0.0))
    assert layers is not None
    x = torch.randn(N, WIDTH, dtype=torch.float64, device=device, requires_grad=True)
    torch.manual_seed(1)
    with torch.set_grad_enabled(graph):
        found = scores(layers, x, True, "torch")
    torch.manual_seed(1)
    logits = theirs(x.clone())
    assert relative_error(found.logits, logits) < 1e-12
    for a, b in zip(module.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    seeds = [torch.randn_like(logits) for _ in range(2)]
    v, gradients = found.pull_back(seeds)
    for one, seed in zip(v, seeds, strict=True):
        (expected_v,) = torch.autograd.grad(logits, x, seed, retain_graph=True)
        assert relative_error(one, expected_v) < 1e-12
    held: dict[Tensor, Tensor] = {}
    for weight, bias, left, right, product in gradients:
        both = (left.t() @ right, left.sum(0)) if product else (left, right)
        held.update((p, g) for p, g in zip((weight, bias), both, strict=True) if p is not None)
    parameters = list(module.parameters())
    assert held.keys() == set(parameters)
    if parameters:
        expected = torch.autograd.grad(logits, list(theirs.parameters()), seeds[-1])
        for p, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(held[p], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["batch_norm", "elu"])
def test_second_derivatives_of_v(name: str, device: torch.device) -> None:
    """The third of the scores, which torch's own backward of batch norm does not have."""
    layer = shaken(LAYERS[name]()).to(device)
    x, seed = (torch.randn(3, WIDTH, dtype=torch.float64, device=device) for _ in range(2))

    def v(z: Tensor) -> Tensor:
        return scores([read(layer)], z, False, "torch").pull_back([seed])[0]

    assert torch.autograd.gradgradcheck(v, x.requires_grad_())


def test_detached_v_carries_no_graph(device: torch.device) -> None:
    layers = known_layers(shaken(LAYERS["chain"]()).to(device), nn.Dropout(0.0))
    assert layers is not None
    x = torch.randn(N, WIDTH, dtype=torch.float64, device=device, requires_grad=True)
    result = scores(layers, x, True, "torch")
    assert result.logits.requires_grad
    assert not result.pull_back([torch.randn_like(result.logits)])[0][0].requires_grad


def test_run_is_scores_without_pullbacks(device: torch.device) -> None:
    layers = known_layers(shaken(LAYERS["chain"]()).to(device).eval(), nn.Dropout(0.0).eval())
    assert layers is not None
    x = torch.randn(N, WIDTH, dtype=torch.float64, device=device)
    assert torch.equal(run(layers, x, "torch"), scores(layers, x, True, "torch").logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_statistics_move_too(dtype: torch.dtype, device: torch.device) -> None:
    """Parameters of another type than x: computed in x's type, statistics kept in their own."""
    layer = nn.BatchNorm1d(WIDTH).to(device, dtype)
    twin = copy.deepcopy(layer).float()
    x = torch.randn(N, WIDTH, device=device)
    assert relative_error(run([read(layer)], x, "torch"), twin(x)) < 1e-6
    assert layer.running_mean is not None
    assert twin.running_mean is not None
    assert layer.running_mean.dtype == dtype
    assert relative_error(layer.running_mean, twin.running_mean) < 2 * torch.finfo(dtype).eps
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("batch_norm")])
def test_an_empty_batch_reaches_every_parameter(name: str, device: torch.device) -> None:
    layer = LAYERS[name]().to(device)
    layers = known_layers(layer, nn.Dropout(0.0))
    assert layers is not None
    found = scores(layers, torch.zeros(0, WIDTH, device=device, requires_grad=True), False, "torch")
    for p in layer.parameters():
        (gradient,) = torch.autograd.grad(found.logits.sum(), p, retain_graph=True)
        assert torch.equal(gradient, torch.zeros_like(p))
    (v,), held = found.pull_back([torch.zeros_like(found.logits)])
    assert v.shape == (0, WIDTH)
    assert [x.shape for one in held for x in one[2:4]] == [(WIDTH,)] * 2 * len(held)
