"""v = d y / d pooled: each layer's rule against torch's own module and autograd."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ggam_fast import GGAMHead
from ggam_fast.base import GGAMHeadBase
from ggam_fast.classifier import closed_form_layers, run, scores, scores_by_autograd
from ggam_fast.reference import GGAMHeadReference
from ggam_fast.stages import Stages
from tests.parity import C, K, N, features, hard_target, relative_error

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
    layers = closed_form_layers(ours, nn.Dropout(0.0))
    assert layers is not None
    x = torch.randn(N, WIDTH, dtype=torch.float64, device=device, requires_grad=True)

    torch.manual_seed(1)
    found = scores(layers, x, False, Stages())
    torch.manual_seed(1)
    expected = theirs(x.clone())
    assert relative_error(found.logits, expected) < 1e-12
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)

    seed = torch.randn_like(expected)
    (v,), _ = found.pull_back([seed])
    (gradient,) = torch.autograd.grad(expected, x, seed, create_graph=True)
    assert relative_error(v, gradient) < 1e-12
    if v.requires_grad and name != "chain":
        parameters = [x, *ours.parameters()], [x, *theirs.parameters()]
        again = [
            torch.autograd.grad(g.sin().sum(), inputs, allow_unused=True, materialize_grads=True)
            for g, inputs in zip((v, gradient), parameters, strict=True)
        ]
        for a, b in zip(*again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_two_gradients_at_once(name: str, training: bool, device: torch.device) -> None:
    """By torch's own backward operations: two v, and the parameters' gradients for the last of them."""
    if name == "batch_norm_bias_alone" and device.type == "cuda":
        pytest.skip("torch's autograd, the yardstick, fails there (2.11)")
    module = shaken(LAYERS[name]()).to(device).train(training)
    layers = closed_form_layers(module, nn.Dropout(0.0))
    assert layers is not None
    x = torch.randn(N, WIDTH, dtype=torch.float64, device=device, requires_grad=True)
    found = scores(layers, x, True, Stages())
    seeds = [torch.randn_like(found.logits) for _ in range(2)]
    v, gradients = found.pull_back(seeds)
    for one, seed in zip(v, seeds, strict=True):
        (expected_v,) = torch.autograd.grad(found.logits, x, seed, retain_graph=True)
        assert relative_error(one, expected_v) < 1e-12
    held: dict[Tensor, Tensor] = {}
    for weight, bias, left, right, product in gradients:
        both = (left.t() @ right, left.sum(0)) if product else (left, right)
        held.update((p, g) for p, g in zip((weight, bias), both, strict=True) if p is not None)
    parameters = list(module.parameters())
    assert held.keys() == set(parameters)
    if parameters:
        expected = torch.autograd.grad(found.logits, parameters, seeds[-1])
        for p, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(held[p], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["batch_norm", "elu"])
def test_second_derivatives_of_v(name: str, device: torch.device) -> None:
    """The third of the scores, which torch's own backward of batch norm does not have."""
    layer = shaken(LAYERS[name]()).to(device)
    x, seed = (torch.randn(3, WIDTH, dtype=torch.float64, device=device) for _ in range(2))

    def v(z: Tensor) -> Tensor:
        return scores([layer], z, False, Stages()).pull_back([seed])[0]

    assert torch.autograd.gradgradcheck(v, x.requires_grad_())


def test_detached_v_carries_no_graph(device: torch.device) -> None:
    layers = closed_form_layers(shaken(LAYERS["chain"]()).to(device), nn.Dropout(0.0))
    assert layers is not None
    x = torch.randn(N, WIDTH, dtype=torch.float64, device=device, requires_grad=True)
    result = scores(layers, x, True, Stages())
    assert result.logits.requires_grad
    assert not result.pull_back([torch.randn_like(result.logits)])[0][0].requires_grad


def test_run_is_scores_without_pullbacks(device: torch.device) -> None:
    layers = closed_form_layers(shaken(LAYERS["chain"]()).to(device).eval(), nn.Dropout(0.0).eval())
    assert layers is not None
    x = torch.randn(N, WIDTH, dtype=torch.float64, device=device)
    assert torch.equal(run(layers, x, Stages()), scores(layers, x, True, Stages()).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_statistics_move_too(dtype: torch.dtype, device: torch.device) -> None:
    """Parameters of another type than x: computed in x's type, statistics kept in their own."""
    layer = nn.BatchNorm1d(WIDTH).to(device, dtype)
    twin = copy.deepcopy(layer).float()
    x = torch.randn(N, WIDTH, device=device)
    assert relative_error(run([layer], x, Stages()), twin(x)) < 1e-6
    assert layer.running_mean is not None
    assert twin.running_mean is not None
    assert layer.running_mean.dtype == dtype
    assert relative_error(layer.running_mean, twin.running_mean) < 2 * torch.finfo(dtype).eps
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("detach", [True, False])
def test_any_module_by_autograd(detach: bool, device: torch.device) -> None:
    module = shaken(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3), nn.GELU())).to(device)
    x = torch.randn(N, WIDTH, dtype=torch.float64, device=device, requires_grad=True)
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    result = scores_by_autograd(module, x, detach)
    seed = torch.randn_like(result.logits)
    (v,), _ = result.pull_back([seed])
    assert len(calls) == 1
    assert v.requires_grad == (not detach)
    assert relative_error(v, torch.autograd.grad(module(x), x, seed)[0]) < 1e-12
    result.logits.sum().backward()


@pytest.mark.parametrize("pool_type", ["avg", ""])
@pytest.mark.parametrize("training", [True, False])
def test_working_in_place_on_the_input_is_refused(
    pool_type: str, training: bool, device: torch.device
) -> None:
    """The gradient would be the one behind the first layer, silently."""
    own = nn.Sequential(nn.Hardtanh(-0.01, 0.05, inplace=True), nn.Flatten(), nn.LazyLinear(K))
    head = GGAMHead(C, K, pool_type=pool_type, classifier=own).to(device, torch.float64).train(training)
    x = features(device).requires_grad_()
    with torch.no_grad():
        head(x)
    for graph in (True, False):
        with (
            torch.set_grad_enabled(graph),
            pytest.raises(ValueError, match="classifier must not change its input in place"),
        ):
            head(x, hard_target(device))
    later = nn.Sequential(nn.Identity(), nn.LazyLinear(K), nn.Hardtanh(inplace=True))
    GGAMHead(C, K, classifier=later).to(device, torch.float64)(x, hard_target(device))


@pytest.mark.parametrize("kind", [GGAMHead, GGAMHeadReference])
def test_statistics_that_are_not_tracked_do_not_move(kind: type[GGAMHeadBase]) -> None:
    head = kind(C, K, hidden_size=8).train()
    norm = head.classifier[0]
    norm.track_running_stats = False
    x = torch.rand(N, C, 3, 3)
    logits = head(x, torch.arange(N) % K).logits
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()
    norm.track_running_stats = True
    assert relative_error(logits, head(x, torch.arange(N) % K).logits) < 1e-6
    assert norm.running_mean.any()


def test_an_assigned_classifier_is_not_the_default_one() -> None:
    head = GGAMHead(C, K, hidden_size=8)
    head.classifier = nn.Sequential(nn.Linear(C, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, K))
    assert head.num_features == C
    head.reset(7)
    assert head(torch.rand(N, C, 3, 3)).shape == (N, 7)
    assert head.num_features == 8
    twin = copy.deepcopy(head)
    first = twin.classifier[1]
    twin.reset(5)
    assert twin.classifier[1] is first


def test_layers_of_a_subclass_without_a_forward_are_known() -> None:
    class Sharded(nn.Sequential):
        """As FSDP makes of a module's class."""

    seen = []
    for kind in (nn.Sequential, Sharded):
        head = GGAMHead(C, K, hidden_size=8, drop_rate=0.5)
        head.classifier.__class__ = kind
        head.drop.register_forward_hook(lambda module, given, out: seen.append(given[0].shape))
        head(torch.rand(N, C, 3, 3))
    assert seen[0] == seen[1] == (N, 8)
