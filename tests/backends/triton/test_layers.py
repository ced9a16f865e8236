"""Small products, batch norms and chains of both as stages, against float64.

`tests/kernels/test_product.py` tests products of all sizes.
"""

import copy

import pytest
import torch
from torch import nn

from ggam_fast.backends.torch import Backend
from ggam_fast.classifier.layers import known_layers, read
from ggam_fast.layer import ELU, RELU, Layer, chain_of
from ggam_fast.norm import SettlingBatchNorm1d

from .cases import check, weights  # first: it skips without triton

from ggam_fast.backends.triton import TRITON as S  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_multiplied_in_float32(
    dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = torch.randn(5, 40, device=device), torch.randn(9, 40, device=device).to(dtype)
    bias = torch.randn(9, device=device).to(dtype)
    (found,) = S.product([x], weight.t(), bias)
    assert found.dtype == torch.float32
    check(found, x.double() @ weight.double().t() + bias.double())


def test_the_channel_mlp(device: torch.device) -> None:
    mean, w1, w2 = (torch.randn(*s, device=device) for s in ((3, 20), (6, 20), (20, 6)))
    b1, b2 = torch.randn(6, device=device), torch.randn(20, device=device)
    found = S.channel_mlp(mean, w1, b1, w2, b2)
    expected = Backend().channel_mlp(*(x.double() for x in (mean, w1, b1, w2, b2)))
    for x, y in zip(found, expected, strict=True):
        check(x, y)


@pytest.mark.parametrize("follows", [None, Layer(ELU, alpha=0.6), Layer(RELU)], ids=["none", "elu", "relu"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, SettlingBatchNorm1d])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(
    training: bool, momentum: float | None, kind: type[nn.BatchNorm1d], follows: Layer | None,
    device: torch.device,
) -> None:  # fmt: skip
    """Two steps and their gradients, statistics included, against the torch stage in float64."""
    norm = kind(70, momentum=momentum).to(device).train(training)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.add_(torch.rand_like(tensor))
    exact = copy.deepcopy(norm).double()
    for _ in range(2):
        x, rows = 2 * weights(9, 70, device) + 1, [weights(9, 70, device) for _ in range(2)]
        y, saved = S.batch_norm(x, read(norm), follows)
        wanted, exact_saved = Backend().batch_norm(x.double(), read(exact), follows)
        check(y, wanted, 1e-5)
        found, *parameters = S.batch_norm_grad(rows, x, read(norm), follows, saved)
        doubled = [v.double() for v in rows]
        expected, *of_exact = Backend().batch_norm_grad(
            doubled, x.double(), read(exact), follows, exact_saved
        )
        for value, reference in zip([*found, *parameters], [*expected, *of_exact], strict=True):
            check(value, reference, 1e-5)
        for value, reference in zip(norm.buffers(), exact.buffers(), strict=True):
            check(value.double(), reference.double(), 1e-5)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_a_chain_is_its_layers(training: bool, rows: int, device: torch.device) -> None:
    """Output, running statistics, dx of one or two dy, and the layers' gradients, last layer first."""
    module = nn.Sequential(
        SettlingBatchNorm1d(24), nn.Linear(24, 9), nn.BatchNorm1d(9), nn.ELU(), nn.Linear(9, 5, bias=False)
    )
    module, exact = module.to(device).train(training), copy.deepcopy(module).to(device).double()
    x, dys = weights(7, 24, device), [weights(7, 5, device) for _ in range(rows)]
    links, of_exact = (
        chain_of(known_layers(m, nn.Dropout(0.0)) or []) for m in (module, exact.train(training))
    )
    assert len(links) == 4
    y, given = S.chain(links, x)
    wanted, exact_given = Backend().chain(of_exact, x.double())
    check(y, wanted, 1e-5)
    for value, reference in zip(module.buffers(), exact.buffers(), strict=True):
        check(value.double(), reference.double(), 1e-5)
    found, grads = S.chain_grad(links, given, dys)
    expected, exact_grads = Backend().chain_grad(of_exact, exact_given, [v.double() for v in dys])
    for value, reference in zip(found, expected, strict=True):
        check(value, reference, 1e-5)
    for layer, other in zip(grads, exact_grads, strict=True):
        assert layer.product == other.product
        for value, reference in ((layer.left, other.left), (layer.right, other.right)):
            torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-5)  # some are zero


def test_the_way_back_through_the_channel_mlp(device: torch.device) -> None:
    de, hidden = torch.randn(3, 20, device=device), torch.randn(3, 6, device=device).relu()
    w1, w2 = (torch.randn(*s, device=device) for s in ((6, 20), (20, 6)))
    found = S.channel_mlp_grad(de, hidden, w1, w2)
    expected = Backend().channel_mlp_grad(*(x.double() for x in (de, hidden, w1, w2)))
    for x, y in zip(found, expected, strict=True):
        check(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_that_torch_runs(dtype: torch.dtype, device: torch.device) -> None:
    """In float64, and where an activation stands alone; with two dy."""
    module = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4), nn.ELU()).to(device, dtype)
    x = torch.randn(5, 8, device=device, dtype=dtype, requires_grad=True)
    links, dys = chain_of(known_layers(module, nn.Dropout(0.0)) or []), torch.randn(2, 5, 4, device=device)
    dys = dys.to(dtype)
    with torch.no_grad():
        y, given = S.chain(links, x)
        found, _ = S.chain_grad(links, given, list(dys))
    expected = module(x)
    torch.testing.assert_close(y, expected)
    for dx, dy in zip(found, dys, strict=True):
        torch.testing.assert_close(dx, torch.autograd.grad(expected, x, dy, retain_graph=True)[0])
