"""Random heads on random features against the float64 reference, on both backends.

    pytest tests/test_fuzz.py            300 examples, the same in every run
    pytest tests/test_fuzz.py -m fuzz    50,000 others; FUZZ_EXAMPLES=N changes the number, and
                                         --hypothesis-seed=N repeats a run

Each example draws shapes, memory layout, type, magnitude and pattern of the features, all options, the
form of the step, train or eval, and whether steps are recorded. A classifier with batch norm trains on
four images or more: of two, each output is +1 or -1 and the exact gradient is zero.

The tolerance follows from the example's conditioning. A float32 computation that is backward stable
returns the exact result of inputs that differ by a few roundings. So the reference runs again in float64,
with every input and parameter changed by up to one rounding of float32. A result may differ by 200 times
as much, or by 10 times the error of the reference in float32, plus 1e-5 of its norm for the roundings of
its own sums. Some examples are not compared:

* Features of 1e5 and more are held to finite results alone, with `cam_detach=False` not even to those.
  Their S and T are one-hot, so gradients are differences of equal numbers, and batch norm of equal rows
  amplifies their rounding.
* The reference may overflow in the types of the results.
* In float16 with `cam_detach=False` autograd adds dA from several nodes in float16, and one may overflow.
* With `spatial_norm="sum"` and `cam_detach=False` second derivatives divide by the square of a sum that
  may underflow.
"""

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ggam_fast import GGAMHead, GGAMLoss, checks
from ggam_fast.functional import fused_ggam_loss
from ggam_fast.reference import GGAMHeadReference
from tests import parity

needs_triton = pytest.mark.skipif(not checks.TRITON_AVAILABLE, reason="needs triton")
if checks.TRITON_AVAILABLE:
    from ggam_fast import recorded

MANY = int(os.environ.get("FUZZ_EXAMPLES", "50000"))
STABLE, PEER, OWN_ROUNDINGS = 200.0, 10.0, 1e-5
TYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUTS = ("dense", "channels_last", "transposed", "sliced", "offset", "expanded")
PATTERNS = ("normal", "relu", "constant", "zero", "one_hot", "negative")
Case = dict[str, Any]


def cases(most_channels: int, most_positions: int) -> st.SearchStrategy[Case]:
    """Anything that the head takes."""
    sizes = {
        "n": st.integers(0, 9),
        "c": st.integers(1, most_channels),
        "h": st.integers(1, most_positions),
        "w": st.integers(1, most_positions),
        "k": st.integers(2, 9),
    }
    drawn = {name: st.sampled_from(values) for name, values in parity.OPTIONS.items() if name != "drop_rate"}
    return st.fixed_dictionaries(
        {
            **sizes,
            "options": st.fixed_dictionaries({**drawn, "hidden_size": st.sampled_from((0, 0, 7))}),
            "pool_type": st.sampled_from(("avg", "avg", "max", "flatten")),
            "dtype": st.sampled_from(tuple(TYPES)),
            "layout": st.sampled_from(LAYOUTS),
            "pattern": st.sampled_from(PATTERNS),
            "exponent": st.sampled_from((0, 0, 0, -20, -7, -3, 2, 5, 20)),
            "seed": st.integers(0, 2**31),
            "soft": st.booleans(),
            "training": st.booleans(),
            "form": st.sampled_from(("drop_in", "fused")),
            "recorded": st.booleans(),
        }
    )


def features(case: Case) -> Tensor:
    """(N, C, H, W) in the case's pattern, magnitude, type and layout."""
    n, c, h, w = (case[name] for name in "nchw")
    x = torch.randn(n, c, h, w, dtype=torch.float64)
    if case["pattern"] == "relu":
        x = x.relu()
    elif case["pattern"] == "constant":
        x = torch.full_like(x, 0.7)
    elif case["pattern"] == "zero":
        x = torch.zeros_like(x)
    elif case["pattern"] == "one_hot":
        x = torch.zeros_like(x)
        x[..., h // 2, w // 2] = 1.0
    elif case["pattern"] == "negative":
        x = -x.abs()
    dtype = TYPES[case["dtype"]]
    exponent = max(min(case["exponent"], 3), -3) if dtype == torch.float16 else case["exponent"]
    x = (x * 10.0**exponent).to(dtype)
    layout = case["layout"]
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "sliced":
        return torch.cat([x, x], 3)[..., ::2] if w > 1 else torch.cat([x, x], 2)[:, :, :h]
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x[:, :1].expand(-1, c, -1, -1) if layout == "expanded" else x


def result(case: Case, module: Any, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Loss, outputs and gradients."""
    leaf = x.detach().requires_grad_()
    if case["form"] == "fused" and isinstance(module, GGAMHead):
        loss, out = fused_ggam_loss(module, leaf, target, guidance_weight=0.3)
    else:
        out = module(leaf, target)
        loss = GGAMLoss(0.3)(out, target)
    return {"loss": loss.detach(), **out._asdict(), **parity.gradients(loss, leaf, module)}


def nudged(x: Tensor, eps: float) -> Tensor:
    """x changed by up to eps, relatively."""
    return x * (1 + eps * (2 * torch.rand_like(x) - 1))


def judge(case: Case, backend: str) -> bool:
    """Compare one example; False if its reference overflows."""
    torch.manual_seed(case["seed"])
    options = dict(case["options"])
    if options["attention"] in ("spatial", "none") and options["cam_norm"] == "standardized_softmax":
        options["cam_norm"] = "standardized"
    if case["pool_type"] == "flatten":
        options["feat_size"] = (case["h"], case["w"])
    x = features(case)
    if backend == "triton" and x.dtype == torch.float64:
        x = x.float()
    small = torch.float64 if x.dtype == torch.float64 else torch.float32
    arguments = {"pool_type": case["pool_type"], "rd_channels": min(3, case["c"]), **options}
    head = GGAMHead(case["c"], case["k"], backend=backend, **arguments).to(small)
    exact = GGAMHeadReference(case["c"], case["k"], **arguments).double()
    training = case["training"] and (case["n"] > 3 or not options["hidden_size"])
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    exact.load_state_dict(head.state_dict())
    head.train(training), exact.train(training)
    target = torch.randint(case["k"], (case["n"],))
    if case["soft"]:
        target = torch.rand(case["n"], case["k"], dtype=torch.float64).softmax(1)
    soft = target.to(small) if case["soft"] else target

    first = copy.deepcopy(exact)
    expected = result(case, first, x.double(), target)
    peer = result(case, copy.deepcopy(exact).to(small), x.to(small), soft)
    stored = expected["features"].to(x.dtype)
    second = not options["cam_detach"] and (x.dtype == torch.float16 or options["spatial_norm"] == "sum")
    if second or not all(bool(v.isfinite().all()) for v in (*peer.values(), stored)):
        return False
    found = result(case, head, x, soft)
    eps = torch.finfo(torch.float32 if small == torch.float32 else torch.float64).eps
    spread = dict.fromkeys(expected, 0.0)
    for _ in range(2):
        moved = copy.deepcopy(exact)
        with torch.no_grad():
            for p in moved.parameters():
                p.copy_(nudged(p, eps))
        for name, value in result(case, moved, nudged(x.double(), eps), target).items():
            spread[name] = max(spread[name], float((value - expected[name]).norm()))
    largest = max(float(v.double().norm()) for v in (*expected.values(), *peer.values()))
    if case["exponent"] >= 5:
        finite = all(bool(v.isfinite().all()) for v in found.values())
        assert finite or not options["cam_detach"], case
        return False
    for name, value in expected.items():
        error = float((found[name].double() - value).norm())
        own = torch.finfo(found[name].dtype).eps if found[name].dtype != torch.float64 else eps
        limit = STABLE * spread[name] + PEER * float((peer[name].double() - value).norm())
        limit += max(OWN_ROUNDINGS if small != torch.float64 else 1e-10, own) * float(value.norm())
        assert error <= limit + 100 * eps * largest, (
            f"{name}: off by {error:.2e} of {float(value.norm()):.2e}: {case}"
        )
    return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    if checks.TRITON_AVAILABLE:
        recorded.enabled = True


def run(case: Case, backend: str) -> bool:
    if checks.TRITON_AVAILABLE:
        recorded.enabled = case["recorded"]
    return judge(case, backend)


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@settings(max_examples=250, derandomize=True, **QUIET)
@given(case=cases(40, 7))
def test_torch(case: Case) -> None:
    run(case, "torch")


@needs_triton
@settings(max_examples=50, derandomize=True, **QUIET)
@given(case=cases(40, 5))
def test_kernels(case: Case) -> None:
    run(case, "triton")


@pytest.mark.fuzz
@settings(max_examples=MANY * 9 // 10, database=None, **QUIET)
@given(case=cases(700, 40))
def test_many_torch(case: Case) -> None:
    run(case, "torch")


@needs_triton
@pytest.mark.fuzz
@settings(max_examples=MANY // 10, database=None, **QUIET)
@given(case=cases(200, 12))
def test_many_kernels(case: Case) -> None:
    run(case, "triton")
