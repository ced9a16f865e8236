"""The small products against float64: sizes around tiles, sums over k that several programs share, and edge
cases such as NaN and empty input."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from ggam_fast import checks
from ggam_fast.backends.torch import Backend
from tests.kernels.trace import needs_interpreter

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

import triton
import triton.language as tl
from ggam_fast.kernels import plan, tf32
from triton.runtime import interpreter

from ggam_fast.backends.triton import TRITON as S
from ggam_fast.backends.triton.register import OPERATORS

SIZES = [(1, 1, 1), (3, 5, 7), (16, 32, 64), (17, 33, 65), (40, 200, 130), (2, 20, 700), (33, 64, 515)]
TOLERANCE = 1e-6  # relative, of the whole matrix: cuBLAS in float32 has 3e-7 on an H100, one TF32 part 3e-4
pytestmark = pytest.mark.usefixtures("poisoned_outputs")


TILES = {
    "planned": None,
    "large": plan.LARGE_PRODUCT,
    "wide": plan.WIDE_PRODUCT,
    "wide, in parts": plan.WIDE_PRODUCT._replace(split=4),
}


@pytest.fixture(params=TILES)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if TILES[request.param] is not None:
        monkeypatch.setattr(plan, "product", lambda *_, **__: TILES[request.param])


def close(found: Tensor, expected: Tensor, *terms: Tensor) -> None:
    """Relative to the largest of what was expected and its terms, which may cancel."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    size = max(float(x.double().norm()) for x in (expected, *terms))
    assert (found.double() - expected).norm() <= TOLERANCE * size


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_times_a_matrix(m: int, n: int, k: int, rows: int, device: torch.device) -> None:
    x = [torch.randn(m, k, device=device) for _ in range(rows)]
    w, b = torch.randn(n, k, device=device), torch.randn(n, device=device)
    mask = torch.randn(m, n, device=device)
    exact = [y.double() @ w.double().t() for y in x]
    for found, e in zip(S.product(x, w.t()), exact, strict=True):
        close(found, e)
    for found, e in zip(S.product(x, w.t().contiguous(), b), exact, strict=True):
        close(found, e + b.double(), e)
    for found, e in zip(S.product(x, w.t(), b, relu=True), exact, strict=True):
        close(found, (e + b.double()).relu(), e)
    for found, e in zip(S.product(x, w.t(), mask=mask), exact, strict=True):
        close(found, e * (mask > 0), e)


SIZES_OF_LAYERS = {
    "any": [(33, 65), (1, 6), (70, 1), (32, 64), (5, 200)],
    "of four": [(32, 68), (4, 8), (72, 20), (36, 64), (4, 200)],
    "odd classes": [(33, 68), (4, 8), (70, 20), (1, 64), (5, 200)],
}


@pytest.mark.parametrize("widths", SIZES_OF_LAYERS)
@pytest.mark.parametrize("n", [1, 7, 70])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("scale", [None, -0.3])
def test_gradients_of_layers(
    widths: str, n: int, count: int, scale: float | None, device: torch.device
) -> None:
    sizes = SIZES_OF_LAYERS[widths][:count]
    factors = [(torch.randn(n, j, device=device), torch.randn(n, c, device=device)) for j, c in sizes]
    given = None if scale is None else torch.tensor(scale, device=device)
    found = S.layer_grads(factors, given)
    assert len(found) == count
    for (weight, bias), (dy, x) in zip(found, factors, strict=True):
        close(weight, (scale or 1.0) * (dy.double().t() @ x.double()))
        terms = (scale or 1.0) * dy.double()
        close(bias, terms.sum(0), terms.abs().sum(0))


@triton.jit
def parts_kernel(x_ptr, high_ptr, low_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    high, low = tf32.parts(tl.load(x_ptr + at))
    tl.store(high_ptr + at, high)
    tl.store(low_ptr + at, low)


def test_parts_of_a_number(device: torch.device) -> None:
    """Nothing is lost, the first is what tensor cores read, and the second is small."""
    x = torch.randn(1024, device=device) * 2.0 ** torch.randint(-100, 100, (1024,), device=device)
    x[:3] = torch.tensor([float("nan")] * 3)
    x[:2].view(torch.int32)[:] = torch.tensor([0x7FFFFFFF, -1])  # as a GPU writes NaN
    x[3:8] = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0, torch.finfo(torch.float32).max])
    high, low = torch.empty_like(x), torch.empty_like(x)
    parts_kernel[(1,)](x, high, low, SIZE=1024)
    assert not (high.view(torch.int32) & 0x1FFF).any()
    assert high[:3].isnan().all()
    assert torch.equal(high[3:5], x[3:5])
    assert torch.equal((high + low)[5:], x[5:])
    assert (low[5:].abs() <= x[5:].abs() * 2.0**-10).all()


def test_sums_are_shared_where_there_are_few_tiles(device: torch.device) -> None:
    planned = plan.product
    assert planned(32, 128, 2048, False, True).split == 16
    assert planned(32, 128, 2048, False, False).split == 1
    assert planned(32, 512, 2048, True, True) == planned(256, 512, 2048, True, True)
    assert planned(32, 512, 2048, True, True).split == 8
    assert planned(32, 2048, 512, False, True).split == 1
    assert planned(32, 512, 200, False, True).block_n == 64
    assert planned(32, 2048, 128, False, True).block_n == 32
    assert planned(256, 2048, 512, False, True).block_m == 32
    assert planned(256, 2048, 512, True, True).block_m == 16
    assert planned(513, 512, 2048, False, True) is None
    assert planned(5, 10, 700, False, True).split == 4
    x, w = torch.randn(5, 700, device=device), torch.randn(700, 10, device=device)
    whole = S.product([x], w)[0]
    for _ in range(3):
        assert torch.equal(S.product([x], w)[0], whole)
    for rows in (slice(2, 3), slice(1, None)):
        assert torch.equal(S.product([x[rows]], w)[0], whole[rows])


@needs_interpreter
@pytest.mark.parametrize("order", ["last first", "shuffled"])
def test_whoever_is_last_adds_up_all_parts(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in any order of programs; the interpreter runs them in theirs, part by part."""
    x, w, b = torch.randn(20, 1030), torch.randn(1030, 40), torch.randn(40)
    expected = S.product([x, -x], w, b, relu=True)
    builder = interpreter.interpreter_builder
    set_grid_idx = builder.set_grid_idx
    programs = 2 * 2 * 2 * plan.product(40, 40, 1030, True, True).split
    order_of = torch.arange(programs).flip(0) if order == "last first" else torch.randperm(programs)
    seen = []

    def permuted(i: int, j: int, k: int) -> None:
        seen.append(int(order_of[i]))
        set_grid_idx(seen[-1], j, k)

    monkeypatch.setattr(builder, "set_grid_idx", permuted)
    found = S.product([x, -x], w, b, relu=True)
    assert sorted(seen) == list(range(programs))
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f, e)


def test_layers_that_do_not_fit_are_refused(device: torch.device) -> None:
    x, w = torch.randn(4, 6, device=device), torch.randn(5, 7, device=device)
    with pytest.raises(RuntimeError, match="takes 5 features; got 6"):
        S.product([x], w)
    with pytest.raises(RuntimeError, match="one batch size"):
        S.layer_grads([(x, torch.randn(3, 5, device=device))])


def test_nan_and_infinity(device: torch.device) -> None:
    """As torch's: NaN passes a ReLU, and a gradient passes where a NaN went in."""
    x = torch.randn(4, 6, device=device)
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    x[3, 1:4] = torch.tensor([0x7FFFFFFF, 0x7F800000, 0], dtype=torch.int32).view(torch.float32)
    w, b = torch.randn(6, 5, device=device).abs(), torch.zeros(5, device=device)
    mask = torch.randn(4, 5, device=device)
    mask[0, 0] = float("nan")
    found, expected = S.product([x], w, b, relu=True)[0], Backend().product([x], w, b, relu=True)[0]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    close(S.product([x[:1]], w, mask=mask[:1])[0], Backend().product([x[:1]], w, mask=mask[:1])[0])


def test_where_tensor_cores_take_float32(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's, and what knows no TF32."""
    monkeypatch.setattr(plan, "dot_options", lambda *_: {"PRECISION": "ieee"})
    x, w, dy = (torch.randn(shape, device=device) for shape in ((20, 300), (300, 40), (20, 40)))
    close(S.product([x], w)[0], x.double() @ w.double())
    close(S.layer_grads([(dy, x)])[0][0], dy.double().t() @ x.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_torchs(dtype: torch.dtype, device: torch.device) -> None:
    x, w = torch.randn(4, 6, device=device, dtype=dtype), torch.randn(6, 5, device=device, dtype=dtype)
    assert torch.equal(S.product([x], w)[0], x @ w)
    assert torch.equal(S.layer_grads([(x, x)])[0][0], x.t() @ x)


def test_empty(device: torch.device) -> None:
    x, w = torch.zeros(0, 6, device=device), torch.randn(6, 5, device=device)
    assert S.product([x, x], w)[1].shape == (0, 5)
    ((weight, bias),) = S.layer_grads([(x, x)])
    assert weight.shape == (6, 6)
    assert not weight.any()
    assert not bias.any()
    dy = torch.randn(4, 5, device=device)
    for layers in ([(dy, dy[:, :0])], [(dy, dy), (dy, dy[:, :0])]):  # of no inputs
        weight, bias = S.layer_grads(layers)[-1]
        assert weight.shape == (5, 0)
        torch.testing.assert_close(bias, dy.sum(0))


def test_large_products_are_torchs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "LARGEST_PRODUCT", 5)
    x, w = torch.randn(4, 6, device=device), torch.randn(6, 5, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        both = S.product([x, x + 1], w)
    for found, expected in zip(both, (x @ w, (x + 1) @ w), strict=True):
        torch.testing.assert_close(found, expected)
    opcheck(OPERATORS["product"], (x, x + 1, w, None, None, False))
    opcheck(OPERATORS["layer_grads"], (x, x, *[None] * 9))
    torch.testing.assert_close(S.layer_grads([(x, x)])[0][0], x.t() @ x)
    assert not S.layer_grads([])
