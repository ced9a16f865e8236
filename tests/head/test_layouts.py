"""Memory layouts: features are not copied, gradients have their layout, and every input format works."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ggam_fast import GGAMHead, checks, functional
from tests.head.heads import BACKENDS, poolings
from tests.parity import (
    C,
    H,
    N,
    W,
    as_format,
    assert_parity,
    combine,
    features,
    gradients,
    hard_target,
    pair,
    relative_error,
)


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


def test_shapes_follow_the_input_format(device: torch.device) -> None:
    x, target = features(device), hard_target(device)
    shapes = {"NCHW": (N, H, W), "NHWC": (N, H, W), "NLC": (N, H * W)}
    for input_fmt, shape in shapes.items():
        head, _ = pair(device=device, input_fmt=input_fmt, hidden_size=0)
        assert head(as_format(x, input_fmt), target).spatial_attention.shape == shape
    plain = GGAMHead(C, 0, pool_type="", input_fmt="NHWC").to(device, torch.float64)
    assert plain(as_format(x, "NHWC")).shape == (N, H, W, C)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"cam_detach": False}, {"pool_type": "max"}, {"pool_type": "flatten", "feat_size": (H, W)}],
)
def test_prefix_tokens_are_no_positions(options: dict[str, Any], backend: str, device: torch.device) -> None:
    """A class token and a register change nothing and get no gradient, in the head and in its reference."""
    keywords = {"hidden_size": 10, "input_fmt": "NLC", "prefix_tokens": 2, **options}
    dtype = torch.float64 if backend == "torch" else torch.float32
    head, reference = pair(device=device, dtype=dtype, backend=backend, **keywords)
    plain, _ = pair(device=device, dtype=dtype, backend=backend, **{**keywords, "prefix_tokens": 0})
    plain.load_state_dict(head.state_dict())
    target, patches = hard_target(device), as_format(features(device, dtype), "NLC")
    tokens = torch.cat([torch.randn(N, 2, C, device=device, dtype=dtype), patches], 1).requires_grad_()
    patches = patches.clone().requires_grad_()

    expected = plain(patches, target)
    expected_gradients = gradients(combine(expected), patches, plain)
    for module, tolerance in ((head, 1e-5), (reference, 1e-4)):
        out = module(tokens, target)
        assert out.spatial_attention.shape == (N, H * W)
        assert_parity(out, expected, tolerance)
        found = gradients(combine(out), tokens, module)
        assert not found["features"][:, :2].any()
        found["features"] = found["features"][:, 2:]
        assert_parity(found, expected_gradients, tolerance)

    loss, _ = functional.fused_ggam_loss(head, tokens, target)
    assert relative_error(loss, functional.fused_ggam_loss(plain, patches, target).loss) < 1e-5
    head.eval(), plain.eval()
    assert relative_error(head(tokens), plain(patches)) < 1e-5
    assert "prefix_tokens=2" in repr(head)
    assert "prefix_tokens" not in repr(plain)
