"""Inputs, parameters, expected results and records of one case.  All its providers share them."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from bench.measure import environment, parity, roofline, side_by_side, timing
from bench.measure.parity import Outputs
from bench.measure.records import Record
from bench.measure.side_by_side import Timed
from bench.suite import peers
from bench.suite.cases import Case
from bench.suite.peers import Peer
from ggam_fast.reference import GGAMHeadReference

OP = "ggam"


class Workload:
    """Random features with zeros as after a ReLU, targets, and parameters that A's type holds exactly."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        torch.manual_seed(0)
        head = peers.new_head(GGAMHeadReference, case)
        # It has its own generator, because a CUDA graph under capture takes over the default one.
        self.random = torch.Generator(device).manual_seed(0)
        self.state = {k: _rounded(v, case.dtype) for k, v in head.state_dict().items()}
        count = timing.buffers_for(case.bytes)
        self.features = [self._features() for _ in range(count)]
        self.leaves = [x.detach().requires_grad_() for x in self.features]  # shared memory
        self.target = torch.randint(peers.NUM_CLASSES, (case.n,), device=device, generator=self.random)
        self._expected: dict[str, tuple[Outputs, Outputs]] = {}

    def _features(self) -> Tensor:
        case = self.case
        shape = (case.n, case.positions, case.c) if case.layout == "nlc" else (case.n, case.c, case.h, case.w)
        x = torch.randn(shape, device=self.device, dtype=case.dtype, generator=self.random).relu_()
        return x.contiguous(memory_format=torch.channels_last) if case.layout == "channels_last" else x

    def inputs(self, peer: Peer) -> list[Tensor]:
        return self.leaves if isinstance(peer, peers.Step) else self.features

    def build(self, provider: str, run: str) -> Peer:
        """A provider with the parameters of this workload."""
        return peers.build(provider, run, self.case, self.state, self.device)

    def results(self, peer: Peer, i: int = 0) -> Outputs:
        """The outputs and gradients of the provider on the i-th buffer."""
        return _detached(peer.results(self.inputs(peer)[i], self.target))

    def expected(self, run: str) -> tuple[Outputs, Outputs]:
        """The results of the reference in float64 and in the type of the case."""
        if run not in self._expected:
            exact_case = self.case._replace(dtype=torch.float64)
            exact = peers.build("eager", run, exact_case, self.state, self.device)
            x = self.features[0].double().requires_grad_(run == "step")
            eager = self.results(self.build("eager", run))
            self._expected[run] = _detached(exact.results(x, self.target)), eager
        return self._expected[run]

    def check(self, provider: str, run: str, peer: Peer) -> float:
        """The larger error of two calls, as a share of the allowed error.  Above 1, Refused is raised."""
        if provider == "memcpy":
            found = peer(self.features[0], self.target)
            if not torch.equal(found, self.features[0]):
                raise parity.Refused("memcpy must copy A; its result differs from A")
            return 0.0
        exact, eager = self.expected(run)
        return max(
            parity.check(provider, self.results(peer), exact, eager, self.case.dtype) for _ in range(2)
        )

    @cached_property
    def memcpy(self) -> dict[str, timing.Spread]:
        """The times of a copy of A."""
        return self.measure({"memcpy": self.build("memcpy", "copy")})["memcpy"].spreads

    def measure(self, peers: dict[str, Peer]) -> dict[str, timing.Measured]:
        calls = {name: self.call(peer) for name, peer in peers.items()}
        captured = [name for name, peer in peers.items() if peer.capturable]
        return timing.measure(calls, len(self.features), captured)

    def timed(self, run: str, providers: Sequence[str]) -> dict[str, Timed[Peer] | Exception]:
        """The times of the providers of one pass, side by side.  memcpy is timed once for all passes."""

        def measure(peers: dict[str, Peer]) -> dict[str, timing.Measured]:
            known = {"memcpy": timing.Measured(self.memcpy, [])}
            return known | self.measure({name: peer for name, peer in peers.items() if name not in known})

        return side_by_side.timed(
            providers,
            build=lambda name: self.build(name, run),
            check=lambda name, peer: self.check(name, run, peer),
            measure=measure,
        )

    def call(self, peer: Peer) -> timing.Call:
        inputs = self.inputs(peer)
        return lambda i: peer(inputs[i], self.target)

    def records(self, provider: str, run: str, timed: Timed[Peer], bandwidth: float) -> list[Record]:
        """One record for each kind of timing.  Memory and launches are measured here."""
        peer = timed.peer
        run = "copy" if provider == "memcpy" else run
        memcpy = self.memcpy
        peer.release(self.inputs(peer)[0])
        # A peer that replays its own CUDA graphs always holds their memory, so the peak of a call means
        # nothing.
        uncounted = provider == "memcpy" or peer.replays
        peak = None if uncounted else timing.peak_bytes(self.call(peer)) / 2**20
        gradients = peer.gradient_bytes(self.inputs(peer)[0]) / 2**20 or None
        launched = timing.launches(self.call(peer))
        now, case = environment.current(), self.case
        counted = roofline.floor_bytes(case.bytes, run)
        least = roofline.floor_seconds(case.bytes, run, bandwidth)
        h, w = (case.positions, 1) if case.layout == "nlc" else (case.h, case.w)
        return [
            Record(
                OP, provider, run, case.n, case.c, h, w, case.type_name, case.layout, kind,
                *(x * 1e6 for x in s), counted, *_ratios(kind, s.p50, counted, memcpy.get(kind), least),
                peak, launched, now, gradients, timed.parity,
            )
            for kind, s in timed.measured.spreads.items()
        ]  # fmt: skip


def _ratios(
    kind: str, seconds: float, counted: int, memcpy: timing.Spread | None, least: float
) -> tuple[float | None, ...]:
    """GB/s, the ratio to a copy of A and the ratio to the floor.  For the host's time they are None."""
    if kind == "host":
        return None, None, None
    return counted / seconds / 1e9, seconds / memcpy.p50 if memcpy else None, seconds / least


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).to(value.dtype) if value.is_floating_point() else value


def _detached(found: Outputs) -> Outputs:
    return {name: x.detach().clone() for name, x in found.items()}
