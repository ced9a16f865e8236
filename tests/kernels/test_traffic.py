"""How often the kernels read and write tensors of A's size, and that they touch no other memory.

The figures are those of the table in `kernels/__init__.py` and of design section 3, counted element by
element from the addresses of every load and store.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ggam_fast import GGAMHead, GGAMLoss, checks
from ggam_fast.functional import fused_ggam_loss
from tests.kernels.trace import Trace, counts, elements, needs_interpreter, traced

pytestmark = needs_interpreter
if checks.TRITON_AVAILABLE:
    from ggam_fast.backends.triton import TRITON as S

SIZES = [(2, 300, 49), (3, 17, 200), (1, 130, 1)]  # C in two partial sums; L in one tile; one position
Inputs = dict[str, Tensor]


def features_grad(x: Inputs, pool_type: str, first: Tensor) -> Tensor:
    return S.features_grad(x["a"], pool_type, first, x["index"], x["t"], x["t"], x["s"], x["s"])


# (reads of A, reads of G, writes of something of A's size)
OPERATORS: dict[str, tuple[Callable[[Inputs], object], tuple[int, int, int]]] = {
    "mean": (lambda x: S.spatial_sum(x["a"], None, 0.5), (1, 0, 0)),
    "spatial_sum": (lambda x: S.spatial_sum(x["a"], x["t"], 0.5), (1, 0, 0)),
    "channel_sum": (lambda x: S.channel_sum(x["a"], x["s"]), (1, 0, 0)),
    "softmax": (lambda x: S.spatial_attention(x["a"], x["s"], "softmax"), (1, 0, 0)),
    "sum": (lambda x: S.spatial_attention(x["a"], x["s"], "sum"), (1, 0, 0)),
    "softmax grad": (
        lambda x: S.spatial_attention_grad(x["a"], x["s"], 1.0, x["t"], x["t"], x["total"], "softmax"),
        (1, 0, 0)),
    "sigmoid grad": (
        lambda x: S.spatial_attention_grad(x["a"], x["s"], 1.0, None, x["t"], x["total"], "sigmoid"),
        (1, 0, 0)),
    "max_pool": (lambda x: S.max_pool(x["a"], x["t"]), (1, 0, 0)),
    "position_scatter": (lambda x: S.position_scatter(x["s"], x["index"], x["t"].shape[1]), (0, 0, 0)),
    "hadamard": (lambda x: S.hadamard(x["a"], x["t"], x["s"], False), (1, 0, 1)),
    "hadamard flat": (lambda x: S.hadamard(x["a"], None, x["s"], True), (1, 0, 1)),
    "grad_cam_means": (lambda x: S.grad_cam_means(x["a"], x["g"], x["t"]), (1, 1, 0)),
    "features_grad avg": (lambda x: features_grad(x, "avg", x["s"]), (0, 0, 1)),
    "features_grad max": (lambda x: features_grad(x, "max", x["s"]), (0, 0, 1)),
    "features_grad dense": (lambda x: features_grad(x, "", x["g"]), (0, 1, 1)),
}  # fmt: skip


def inputs(n: int, c: int, l: int, layout: str) -> Inputs:
    def dense(*shape: int) -> Tensor:
        x = torch.randn(shape)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "channels_last" else x

    index = torch.randint(l, (n, c))
    return {"a": dense(n, c, l).bfloat16(), "g": dense(n, c, l), "t": torch.rand(n, l), "s": torch.rand(n, c),
            "total": torch.rand(n), "index": index}  # fmt: skip


def of_map_size(trace: Trace, a: Tensor) -> list[Tensor]:
    # What a recording allocates is on no device.
    return [b for b in trace.buffers if b.numel() == a.numel() and b.dim() == 3 and not b.is_meta]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", list(OPERATORS))
def test_every_element_once_and_nothing_else(name: str, size: tuple[int, int, int], layout: str) -> None:
    call, (a_reads, g_reads, writes) = OPERATORS[name]
    x = inputs(*size, layout)
    with traced() as trace:
        call(x)
    read = counts(trace.loads, x["a"])
    if name == "max_pool":  # looks its maxima up again
        index = x["a"].float().mul(x["t"].unsqueeze(1)).max(2).indices
        read -= torch.nn.functional.one_hot(index, size[2]).numpy()
    assert (read == a_reads).all()
    assert (counts(trace.loads, x["g"]) == g_reads).all()
    assert not trace.unknown(x.values())
    for launch in range(1, trace.launches + 1):
        stored = Counter(a for s in trace.stores if s.launch == launch for a in s.addresses.tolist())
        loaded = {a for s in trace.loads if s.launch == launch for a in s.addresses.tolist()}
        assert max(stored.values()) == 1, "an element was written twice in one launch"
        assert not loaded & stored.keys(), "a launch reads what it writes"
    for buffer in trace.buffers:
        assert (counts(trace.stores, buffer) == 1).all()
    if size[1] > 1 and size[2] > 1:
        assert len(of_map_size(trace, x["a"])) == writes


# Reads of A in the forward, for beta, and in the backward; the backward writes dA once.
STEPS = {
    "avg": ({"pool_type": "avg"}, (3, 2, 2)),  # g, U, z | dT, ds | dT, ds
    "avg attended": ({"pool_type": "avg", "cam_at": "attended"}, (3, 0, 2)),
    # The target of T costs no read where dT is in hand, else one channel_sum.
    "avg positions": ({"pool_type": "avg", "position_guidance": "relu"}, (3, 2, 2)),
    "avg attended positions": (
        {"pool_type": "avg", "cam_at": "attended", "position_guidance": "standardized_softmax"},
        (3, 1, 2),
    ),
    "avg spatial positions": (
        {"pool_type": "avg", "attention": "spatial", "position_guidance": "relu"},
        (2, 1, 1),
    ),
    "max positions": ({"pool_type": "max", "position_guidance": "relu"}, (3, 1, 1)),
    "avg channel": ({"pool_type": "avg", "attention": "channel"}, (1, 0, 0)),
    "avg spatial": ({"pool_type": "avg", "attention": "spatial"}, (2, 1, 1)),
    "none": ({"pool_type": "avg", "attention": "none"}, (1, 0, 0)),
    "max": ({"pool_type": "max"}, (3, 1, 1)),  # g, U, maximum | ds | ds; dT comes from the maxima
    "flatten": ({"pool_type": "flatten", "feat_size": (3, 5)}, (3, 2, 2)),  # g, U, D | (A, G), ds | the same
}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("step", list(STEPS))
def test_passes_of_a_training_step(step: str, layout: str) -> None:
    options, expected = STEPS[step]
    head = GGAMHead(24, 6, hidden_size=0, rd_channels=6, backend="triton", **options)  # type: ignore[arg-type]
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(3, 24, 3, 5).abs().contiguous(memory_format=memory).requires_grad_()
    target = torch.tensor([0, 3, 5])

    def reads(trace: Trace) -> int:
        found = counts(trace.loads, x.detach())
        if options["pool_type"] == "max":
            return round(np.median(found))  # the maxima are looked up again
        assert (found == found.flat[0]).all()
        return int(found.flat[0])

    with traced() as plain:
        head(x)
    with traced() as guided:
        out = head(x, target)
    loss = GGAMLoss(guidance_weight=0.5)(out, target)
    arrived: list[Tensor] = []
    x.register_hook(arrived.append)
    with traced() as backward:
        loss.backward()
    assert (reads(plain), reads(guided) - reads(plain), reads(backward)) == expected
    (da,) = arrived  # not x.grad, which may be a copy
    assert (counts(backward.stores, da) == 1).all()
    others = [b for b in of_map_size(backward, x) if b.data_ptr() != da.data_ptr()]
    assert not others, "something besides dA has the size of A"
    # Nor is there such a thing in a block of memory for several.
    of_features = set(elements(da).ravel().tolist())
    for launch in range(1, backward.launches + 1):
        stored = {a for s in backward.stores if s.launch == launch for a in s.addresses.tolist()}
        assert (
            len(stored - of_features) < x.numel() or options["pool_type"] == "flatten"
        )  # G, the classifier's
    assert len(of_map_size(guided, x)) == (options["pool_type"] == "flatten")


@pytest.mark.parametrize(
    ("options", "reads"),
    [({}, 5), ({"cam_at": "attended"}, 6), ({"attention": "spatial"}, 4), ({"pool_type": "max"}, 5)],
)
def test_passes_of_a_fused_step(options: dict[str, Any], reads: int) -> None:
    """Guidance of positions reads A no more than a step without it, but for one pass "attended".

    Where dT is in hand as a sum over channels, it has no launch more either.
    """
    target = torch.tensor([0, 3, 5])
    found, launches = [], []
    for guidance in ("none", "relu"):
        given: dict[str, Any] = {**options, "position_guidance": guidance}
        head = GGAMHead(24, 6, hidden_size=0, rd_channels=6, backend="triton", **given)
        x = torch.randn(3, 24, 3, 5).abs().requires_grad_()
        with traced() as trace:
            fused_ggam_loss(head, x, target).loss.backward()
        found.append(round(np.median(counts(trace.loads, x.detach()))))
        launches.append(trace.launches)
    assert (launches[0] == launches[1]) == (options in ({}, {"attention": "spatial"}))
    assert found == [reads - (options.get("cam_at") == "attended"), reads]


@pytest.mark.parametrize("pool_type", ["avg", "max", ""])
def test_features_without_a_dense_axis_are_copied_once(
    pool_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One stage of several passes over A: one copy."""
    a = torch.stack([torch.randn(2, 20, 9)] * 2, -1)[..., 0]
    s, t = torch.randn(2, 20).softmax(-1), torch.rand(2, 9)
    copies: list[Tensor] = []
    contiguous = Tensor.contiguous

    def counted(x: Tensor, **options: Any) -> Tensor:
        found = contiguous(x, **options)
        copies.extend([found] * (x.shape == a.shape and found is not x))
        return found

    monkeypatch.setattr(Tensor, "contiguous", counted)
    S.attended(a, s, "softmax", pool_type)
    assert len(copies) == 1
    S.attention_backward(a, [s, s], 1.0, None, t, t[:, 0], "softmax")
    assert len(copies) == 2


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", ["mean", "channel_sum", "spatial_sum"])
def test_each_pass_begins_where_the_one_before_ended(name: str, layout: str) -> None:
    x = inputs(4, 300, 49, layout)
    with traced() as trace:
        OPERATORS[name][0](x)
    images = [set(elements(image).ravel().tolist()) for image in x["a"]]
    first = [int(a.addresses[0]) for a in trace.loads if a.addresses.size]
    order = [n for address in first for n, image in enumerate(images) if address in image]
    assert sorted(set(order)) == [0, 1, 2, 3]
    assert order == sorted(order, reverse=name == "channel_sum")
