"""A record needs parity: a wrong provider is refused, and a correct one is accepted in every pass."""

from collections.abc import Iterator

import pytest
import torch

from bench.measure import parity, timing
from bench.measure.side_by_side import Timed
from bench.suite import peers
from bench.suite.cases import PASSES, Case
from bench.suite.workload import Workload
from ggam_fast import GGAMHead, GGAMLoss, functional

CASE = Case(4, 32, 5, 3, torch.float32)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(timing, "ROUNDS", (2, 3))
    monkeypatch.setattr(timing, "CPU_BUDGET", 0.02)
    monkeypatch.setattr(timing, "CPU_BLOCK", 0.01)
    monkeypatch.setattr(timing, "CPU_TURNS", (2, 3))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield


@pytest.fixture
def work(device: torch.device) -> Workload:
    return Workload(CASE, device)


@pytest.mark.parametrize(
    ("run", "layout"), [*((run, "nchw") for run in PASSES), ("step", "channels_last"), ("step", "nlc")]
)
def test_every_pass(run: str, layout: str, device: torch.device) -> None:
    work = Workload(CASE._replace(layout=layout), device)
    providers = ("eager", "fused", "fused_modular")[: 3 if run == "step" else 2]
    for provider, timed in work.timed(run, providers).items():
        assert isinstance(timed, Timed)
        found = work.records(provider, run, timed, bandwidth=1e9)
        by_timing = {record.timing: record for record in found}
        row = by_timing["hot"]
        assert (row.run, row.provider, row.N, row.C, row.H * row.W) == (run, provider, 4, 32, 15)
        assert 0 < row.p20 <= row.p50 <= row.p80
        assert row.x_floor == pytest.approx(row.p50 / 1e6 * 1e9 / row.bytes)
        assert row.peak_mib
        assert row.parity is not None
        assert row.parity <= 1


def test_bfloat16(device: torch.device) -> None:
    work = Workload(CASE._replace(dtype=torch.bfloat16, n=16), device)
    for provider in ("eager", "fused"):
        assert work.check(provider, "step", work.build(provider, "step")) <= 1


def test_a_wrong_output_is_refused(work: Workload) -> None:
    peer = work.build("fused", "fwd_beta")
    right = peer.call
    peer.call = lambda x, y: right(x, y)._replace(cam_weights=right(x, y).cam_weights * 1.01)
    with pytest.raises(parity.Refused, match=r"fused is 1.0e-02 off in cam_weights"):
        work.check("fused", "fwd_beta", peer)


def test_a_wrong_gradient_is_refused(work: Workload) -> None:
    peer = work.build("fused", "step")
    assert isinstance(peer, peers.Step)
    peer.parameters["fc1.weight"].register_hook(lambda grad: grad + grad.abs().max() * 0.1)
    with pytest.raises(parity.Refused, match=r"off in fc1.weight"):
        work.check("fused", "step", peer)


def test_a_failure_is_its_providers_alone(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    build = work.build

    def tampered(provider: str, run: str) -> peers.Peer:
        if provider == "captum":
            raise ImportError("no captum")
        peer = build(provider, run)
        if provider == "fused":
            right = peer.call
            peer.call = lambda x, y: right(x, y) * 1.01
        return peer

    monkeypatch.setattr(work, "build", tampered)
    found = work.timed("beta", ("captum", "fused", "eager"))
    assert {name: type(x) for name, x in found.items()} == {
        "captum": ImportError,
        "fused": parity.Refused,
        "eager": Timed,
    }


def test_a_wrong_beta_is_refused_by_the_step(work: Workload) -> None:
    """Raw beta is so small that only standardized beta changes the gradients visibly."""
    exact, eager = work.expected("step")
    head = peers.new_head(GGAMHead, CASE, work.state).to(work.device).train()
    noise = torch.randn(CASE.n, CASE.c, generator=work.random, device=work.device)

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = head(x, y)
        s, beta = out.channel_attention, out.cam_weights
        wrong = functional.guidance_loss(s, beta * (1 + 0.01 * noise), cam_norm="standardized")
        return GGAMLoss(peers.GUIDANCE_WEIGHT)(out._replace(guidance_loss=wrong), y)

    with pytest.raises(parity.Refused, match="off in"):
        parity.check("fused", work.results(peers.Step(head, loss_of)), exact, eager, torch.float32)


def test_a_provider_that_is_right_only_once_is_refused(work: Workload) -> None:
    peer = work.build("fused", "fwd")
    right, calls = peer.call, []

    def drifting(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return right(x, y) * (1 if len(calls) == 1 else 2)

    peer.call = drifting
    with pytest.raises(parity.Refused, match="logits"):
        work.check("fused", "fwd", peer)
