"""The ticket schedule of the fused kernels: any number of programs, and re-reads that find A in the cache."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ggam_fast import checks
from tests.kernels.interleave import interleaved
from tests.kernels.trace import Trace, counts, elements, needs_interpreter, traced

pytestmark = needs_interpreter
if checks.TRITON_AVAILABLE:
    from ggam_fast import ops

    S = ops.TRITON

C, L = 150, 49


def features(n: int, layout: str) -> Tensor:
    a = torch.randn(n, C, L).abs()
    return a.transpose(1, 2).contiguous().transpose(1, 2) if layout == "channels_last" else a


def forward(a: Tensor, pool_type: str = "avg", norm: str = "softmax") -> tuple[Tensor, ...]:
    return S.attended(a, torch.full(a.shape[:2], 1 / C), norm, pool_type)


def backward(a: Tensor, rows: int = 2) -> tuple[Tensor, ...]:
    n = a.shape[0]
    grads = [torch.full((n, C), 1.0 + r) for r in range(rows)]
    pairs = S.attention_backward(a, grads, 1.0, None, torch.full((n, L), 1 / L), torch.ones(n), "softmax")
    return tuple(x for pair in pairs for x in pair)


def set_group(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of this many float32 images."""
    monkeypatch.setattr(ops.plan, "GROUP_BYTES", images * C * L * 4)


@pytest.mark.parametrize("call", [forward, backward])
@pytest.mark.parametrize(("programs", "group"), [(3, 1), (1, 2), (1, 3), (3, 16)])
def test_any_number_of_programs_and_any_group_give_the_same_bits(
    call: Callable[[Tensor], tuple[Tensor, ...]], programs: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs one program after another: a task that waits for a later ticket would hang."""
    a = features(5, "nchw")
    expected = call(a)
    set_group(group, monkeypatch)
    monkeypatch.setattr(ops, "_programs", lambda *_: programs)
    for found, wanted in zip(call(a), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("call", "why"), [(forward, "the pool waits for the map"), (backward, "the sums wait for the map")]
)
def test_no_phase_comes_before_what_it_waits_for(
    call: Callable[[Tensor], object], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops.plan, "REREAD_LAG", -1)
    with interleaved(0), pytest.raises(Exception, match=why):  # which ends where the programs all wait
        call(features(2, "nchw"))


def test_pass_by_pass_on_amd_and_where_tickets_would_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.empty(1, C, L)
    assert ops._schedule(a, ops.plan.FORWARD) is not None
    assert ops._schedule(a.expand(2**27, C, L), ops.plan.FORWARD) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with traced() as trace:
        forward(a)
    assert trace.launches > 1


CALLS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "forward": forward,
    "forward dense": lambda a: forward(a, ""),
    "backward": lambda a: backward(a, 1),
    "backward of a pair": backward,
}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", list(CALLS))
def test_reads_every_element_of_the_features_twice_as_its_docstring_says(name: str, layout: str) -> None:
    a = features(3, layout)
    with traced() as trace:
        CALLS[name](a)
    assert trace.launches == 1
    assert (counts(trace.loads, a) == 2).all()
    for buffer in trace.buffers:
        if buffer.numel() == a.numel():
            assert (counts(trace.stores, buffer) == 1).all()


def reuse_distances(trace: Trace, a: Tensor) -> np.ndarray:
    """For every read of an image but its first, how many other images were read since it was read last."""
    home = {int(p): n for n, image in enumerate(elements(a)) for p in image.ravel()}
    order = [
        home[int(x.addresses[0])] for x in trace.loads if len(x.addresses) and int(x.addresses[0]) in home
    ]
    order = [n for i, n in enumerate(order) if i == 0 or order[i - 1] != n]
    found = []
    for i, n in enumerate(order):
        earlier = [k for k in range(i) if order[k] == n]
        if earlier:
            found.append(len(set(order[earlier[-1] + 1 : i])))
    return np.array(found)


@pytest.mark.parametrize("call", [forward, backward])
def test_a_group_is_read_again_before_many_others(
    call: Callable[[Tensor], tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `plan.GROUP_BYTES` counts on: from one read of an image to the next, no more than so many groups
    are read, its own included; pass after pass over the batch would read all of it."""
    set_group(2, monkeypatch)
    groups = 1 + 2 * ops.plan.REREAD_LAG
    a = features(2 * groups + 2, "nchw")
    with traced() as trace:
        call(a)
    assert reuse_distances(trace, a).max() < groups * 2
