"""Streams, threads and replayed graphs give the same bits, because launches share no memory."""

import threading

import pytest
import torch
from torch import Tensor

from bench.measure import parity, timing
from bench.measure.parity import Outputs
from bench.suite.cases import Case
from bench.suite.workload import Workload

pytestmark = pytest.mark.gpu
CASES = [
    Case(8, 512, 14, 14),
    Case(64, 2048, 14, 14, layout="channels_last"),
    Case(4, 1024, 32, 32, torch.float32, "nlc"),
]


def bits(work: Workload) -> list[Tensor]:
    """Loss, dA and all parameter gradients of one fused step."""
    return list(work.results(work.build("fused", "step")).values())


def flipped(x: Tensor) -> Tensor:
    """Different features in the same layout."""
    return torch.empty_like(x).copy_(x.flip(0))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("threads", [False, True], ids=["streams", "threads"])
def test_two_at_once(case: Case, threads: bool, device: torch.device) -> None:
    works = [Workload(case, device) for _ in range(2)]
    works[1].leaves = [flipped(x).requires_grad_() for x in works[1].features]
    alone = [bits(work) for work in works]
    found: list[list[list[Tensor]]] = [[], []]
    streams = [torch.cuda.Stream() for _ in works]
    torch.cuda.synchronize()

    def run(i: int, times: int) -> None:
        with torch.cuda.stream(streams[i]):
            for _ in range(times):
                found[i].append(bits(works[i]))

    if threads:
        started = [threading.Thread(target=run, args=(i, 10)) for i in range(2)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    else:
        for _ in range(10):
            for i in range(2):
                run(i, 1)
    torch.cuda.synchronize()
    for i, expected in enumerate(alone):
        assert len(found[i]) == 10
        for repeat in found[i]:
            assert all(torch.equal(a, b) for a, b in zip(repeat, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graph_replays(case: Case, device: torch.device) -> None:
    work = Workload(case, device)
    work.leaves = work.leaves[:1]
    peer = work.build("fused", "step")
    leaf, features = work.leaves[0], work.features[0].clone()
    graph = timing.capture(work.call(peer), 1)
    for inputs in (features, features.flip(0), features):
        with torch.no_grad():
            leaf.copy_(inputs)
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert leaf.grad is not None
        replayed = leaf.grad.clone()
        eager = torch.empty_like(features).copy_(inputs).requires_grad_()
        expected = work.build("fused", "step").results(eager, work.target)["features"]
        assert torch.equal(replayed, expected)


def test_compiled_into_graphs(device: torch.device) -> None:
    """torch.compile's mode "reduce-overhead" replays its recording on changing inputs."""
    work = Workload(CASES[0], device)
    work.leaves = [x.detach().requires_grad_() for x in (work.features[0], flipped(work.features[0]))]
    compiled = work.build("fused_compiled", "step")
    expected = [work.results(compiled, i) for i in range(2)]
    peer = work.build("fused_reduce_overhead", "step")
    seen: dict[int, Outputs] = {}
    with torch._inductor.config.patch({"triton.cudagraph_or_error": True}):
        for i in (0, 1, 0, 1, 0, 1):
            found = work.results(peer, i)
            for name, first in seen.setdefault(i, found).items():
                assert torch.equal(found[name], first), name
            # The compiler times its reductions again for each function, so bits may differ between the two.
            for name, off in parity.errors(found, expected[i]).items():
                assert off <= (1e-2 if name == "features" else 1e-4), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphed_callables(case: Case, device: torch.device) -> None:
    """torch.cuda.make_graphed_callables replays forward and backward on changing inputs."""
    work = Workload(case, device)
    work.leaves = [x.detach().requires_grad_() for x in (work.features[0], flipped(work.features[0]))]
    compiled, graphed = (work.build(name, "step") for name in ("fused_compiled", "fused_graphed"))
    for i in (0, 1, 0):
        found, expected = work.results(graphed, i), work.results(compiled, i)
        for name, off in parity.errors(found, expected).items():
            # Two compilations may differ in bits, as above.
            assert off <= (1e-2 if name == "features" else 1e-4), name
