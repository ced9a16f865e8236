"""How providers are built and what they leave behind."""

import pytest
import torch

from bench.suite import peers
from bench.suite.cases import Case, providers
from bench.suite.workload import Workload

CASE = Case(4, 32, 5, 3, torch.float32)


@pytest.fixture
def work(device: torch.device) -> Workload:
    return Workload(CASE, device)


def test_step_leaves_the_gradients_it_is_timed_with(work: Workload) -> None:
    peer = work.build("fused", "step")
    work.memcpy  # noqa: B018  (other providers in between change nothing)
    work.call(peer)(0)
    assert peer.gradient_bytes(work.leaves[0]) > work.leaves[0].nbytes
    assert work.features[0].grad is None


@pytest.mark.slow
def test_the_reference_compiles(work: Workload) -> None:
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        assert work.check("compiled", "step", work.build("compiled", "step")) <= 1
    torch._dynamo.reset()


def test_a_step_names_its_gradients(work: Workload) -> None:
    peer = work.build("fused", "step")
    assert isinstance(peer, peers.Step)
    found = work.results(peer)
    assert found.keys() == {"loss", "features", *peer.parameters}
    peer.release(work.leaves[0])
    assert peer.gradient_bytes(work.leaves[0]) == 0


def test_what_replays_its_own_graphs_is_not_captured(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_compiled", lambda provider, call: call)
    for name in providers("step"):
        peer = work.build(name, "step")
        replays = name in ("compiled_reduce_overhead", "fused_reduce_overhead", "fused_graphed")
        assert (peer.replays, peer.capturable) == (replays, not replays), name
