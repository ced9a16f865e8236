"""The cross entropy kernel against torch's in float64, and its results for labels out of range."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ggam_fast import checks

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast.kernels import cross_entropy, plan
from triton.runtime import interpreter

from .trace import needs_interpreter

INF, NAN = float("inf"), float("nan")
CLASSES = [1, 2, 97, 127, 128, 129, 4096, 4097, 9001]


@pytest.fixture(autouse=True)
def _asserts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter leaves out a kernel's asserts, as launches without debug=True do."""
    if not torch.cuda.is_available():
        options = interpreter.InterpreterOptions(debug=True)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


def rows(x: Tensor, target: Tensor, want: str = "losses dce dy share total", ignore: int | None = None,
         smoothing: float = 0.0, predicted: bool = False, guidance: Tensor | None = None, weight: float = 0.0,
         ) -> dict[str, Any]:  # fmt: skip
    """What is wanted by name, each in a buffer of NaN with a guard row before and after."""
    n, k = x.shape
    block, warps = plan.cross_entropy(k)
    sizes = {"losses": (n,), "dce": (n, k), "dy": (n, k), "share": (n,), "total": ()}
    buffers = {name: torch.full((n + 2, k), NAN, device=x.device) for name in want.split()}
    out: dict[str, Any] = dict.fromkeys(sizes)
    for name, buffer in buffers.items():
        size = sizes[name]
        out[name] = buffer[1:-1] if len(size) == 2 else buffer.view(-1)[k : k + n] if size else buffer[1, 0]
    counter = torch.zeros((), dtype=torch.int32, device=x.device) if "total" in want else None
    cross_entropy.cross_entropy_kernel[(n,)](
        x, target, out["losses"], out["dce"], out["dy"], out["share"], counter, guidance, out["total"],
        -100 if ignore is None else ignore, smoothing, weight, n, K=k, HARD=not target.is_floating_point(),
        IGNORE=ignore is not None, PREDICTED=predicted, BLOCK_K=block, num_warps=warps, debug=True,
    )  # fmt: skip
    for name, buffer in buffers.items():
        count = max(1, torch.Size(sizes[name]).numel())
        assert buffer.view(-1)[:k].isnan().all(), name
        assert buffer.view(-1)[k + count :].isnan().all(), name
    return out


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert not found.isnan().any()
    assert (found.double() - expected).norm() <= tolerance * expected.norm() + 1e-7


def targets(kind: str, n: int, k: int, device: torch.device) -> Tensor:
    if kind == "hard":
        return torch.randint(k, (n,), device=device)
    soft = torch.rand(n, k, device=device) * (torch.rand(n, k, device=device) < 0.3)
    return soft if kind == "soft" else soft / soft.sum(1, keepdim=True).clamp(min=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["hard", "soft", "probabilities"])
@pytest.mark.parametrize("k", CLASSES)
def test_against_torch(k: int, kind: str, smoothing: float, device: torch.device) -> None:
    n = 3
    x, target = 4.0 * torch.randn(n, k, device=device), targets(kind, n, k, device)
    wide = target if kind == "hard" else target.double()
    leaf = x.double().requires_grad_()
    losses = F.cross_entropy(leaf, wide, reduction="none", label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(losses.mean(), leaf)
    guidance = torch.tensor(2.5, device=device)
    out = rows(x, target, smoothing=smoothing, guidance=guidance, weight=0.3)
    close(out["losses"], losses.detach())
    close(out["dce"], grad)
    close(out["total"], losses.detach().mean() + 0.75)
    assert torch.equal(out["dy"], F.one_hot(target, k).float() if kind == "hard" else target)
    assert torch.equal(out["share"], torch.full((n,), 1.0 / n, device=device))
    score = rows(x, target, "dy", smoothing=smoothing, predicted=True)["dy"]
    assert torch.equal(score, F.one_hot(x.argmax(1), k).float())


@pytest.mark.parametrize("want", ["losses", "dce", "dy", "losses total", "share", "losses dce dy share"])
def test_what_is_not_asked_for(want: str, device: torch.device) -> None:
    x, target = torch.randn(2, 11, device=device), torch.tensor([3, 10], device=device)
    every, some = rows(x, target), rows(x, target, want)
    for name in want.split():
        assert torch.equal(some[name], every[name])


@pytest.mark.parametrize("n", [1, 2, 7, 129])
def test_images_that_do_not_count(n: int, device: torch.device) -> None:
    """Have zeros whatever their logits are; the others share the mean."""
    k = 7
    x, target = torch.randn(n, k, device=device), torch.randint(k, (n,), device=device)
    target[::3] = -1
    x[::3] = torch.tensor([NAN, INF, -INF, 1.0, 1e30, 0.0, -1.0], device=device)
    counts = target != -1
    leaf = x.double().nan_to_num(0.0, 0.0, 0.0).requires_grad_()
    losses = F.cross_entropy(leaf, target, reduction="none", ignore_index=-1, label_smoothing=0.2)
    mean = losses.sum() / counts.sum().clamp(min=1)
    (grad,) = torch.autograd.grad(mean, leaf)
    for predicted in (False, True):
        out = rows(x, target, ignore=-1, smoothing=0.2, predicted=predicted)
        for name, expected in (("losses", losses), ("dce", grad), ("total", mean)):
            close(out[name], expected.detach())
            if name != "total":
                assert not out[name][~counts].any()
        share = counts / counts.sum().clamp(min=1)
        torch.testing.assert_close(out["share"], share)
        seen = x.nan_to_num(0.0).argmax(1) if predicted else target.clamp(min=0)
        assert torch.equal(out["dy"], F.one_hot(seen, k).float() * counts.unsqueeze(1))


def test_no_image_counts(device: torch.device) -> None:
    x, target = torch.full((4, 5), NAN, device=device), torch.full((4,), 2, device=device)
    out = rows(x, target, ignore=2, guidance=torch.tensor(3.0, device=device), weight=0.5)
    assert out["total"] == 1.5
    assert not any(out[name].any() for name in ("losses", "dce", "dy", "share"))


@pytest.mark.parametrize("k", [8, 5000])
def test_the_first_of_many_maxima(k: int, device: torch.device) -> None:
    x = torch.randint(3, (6, k), device=device).float()
    x[1], x[2, k // 2], x[2, k - 1] = -INF, NAN, NAN
    x[3, 3:5], x[4] = INF, NAN
    expected = F.one_hot(x.argmax(1), k).float()
    assert torch.equal(rows(x, torch.zeros(6, k, device=device), "dy", predicted=True)["dy"], expected)


def test_extremes(device: torch.device) -> None:
    """Logits of +-1e4, a class that is masked out, and a NaN that stays in its row."""
    x = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4], [0.0, -INF, 1.0],
                      [NAN, 0.0, 0.0], [1e4, -1e4, 0.0]], device=device)  # fmt: skip
    target = torch.tensor([0, 1, 2, 0, 1, 1], device=device)
    leaf = x.double().requires_grad_()
    losses = F.cross_entropy(leaf, target, reduction="none")
    (grad,) = torch.autograd.grad(losses.mean(), leaf)
    for given in (target, F.one_hot(target, 3).float()):
        out = rows(x, given)
        torch.testing.assert_close(out["losses"].double(), losses.detach(), rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(out["dce"].double(), grad, rtol=1e-5, atol=1e-8, equal_nan=True)


@needs_interpreter
@pytest.mark.parametrize("ignore", [None, -5])
@pytest.mark.parametrize("label", [-1, 7, -100, 2**32 + 1, -(2**40)])
def test_labels_outside_raise(
    label: int, ignore: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, target = torch.randn(3, 7, device=device), torch.tensor([1, label, 6], device=device)
    with pytest.raises(Exception, match=r"target must be in \[0, K\)"):
        rows(x, target, ignore=ignore)
    monkeypatch.undo()  # without asserts the loss tells, and the other images are what they were
    out = rows(x, target, ignore=ignore)
    assert out["losses"].isnan().tolist() == [False, True, False]
    assert out["total"].isnan()


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_from_the_total(size: int, dtype: torch.dtype, device: torch.device) -> None:
    grad, dce = torch.tensor(-1.5, dtype=dtype, device=device), torch.randn(size, device=device)
    buffer, of_guidance = torch.full((size + 32,), NAN, device=device), torch.full((), NAN, device=device)
    for given in (of_guidance, None):
        cross_entropy.cross_entropy_grad_kernel[(plan.blocks(size, plan.SCALE_BLOCK),)](
            grad, dce, buffer[16:-16], given, 0.25, size, BLOCK=plan.SCALE_BLOCK, num_warps=4
        )
    assert torch.equal(buffer[16:-16], -1.5 * dce)
    assert of_guidance == -0.375
    assert buffer[:16].isnan().all()
    assert buffer[-16:].isnan().all()
