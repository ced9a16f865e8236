"""The providers.  Each is built the same way and called with (features, target).

    eager                     the paper's method, with Grad-CAM by a second backward pass
                              (`ggam_fast.reference`)
    compiled                  `eager` under torch.compile, mode "default"
    compiled_max_autotune     `eager` under torch.compile, mode "max-autotune-no-cudagraphs"
    compiled_reduce_overhead  `eager` under torch.compile, mode "reduce-overhead": CUDA graphs that first
                              copy A into their own buffer; the "graph" timings of the two above do not
    compiled_closed_form      `fused` with the stages in plain torch (backend="torch") under torch.compile
    fused                     this library: `fused_ggam_loss` for the step, the head for the rest
    fused_modular             the head, then `GGAMLoss`
    fused_compiled            `fused` inside torch.compile(fullgraph=True)
    fused_modular_compiled    `fused_modular` inside torch.compile(fullgraph=True); only for `bench.host`
    fused_reduce_overhead     `fused_compiled` in mode "reduce-overhead", with the copy of A
    fused_graphed             `fused_compiled` through torch.cuda.make_graphed_callables: two CUDA graphs, no
                              guards at a call, with the copy of A; only for the step
    grad_cam, captum, torchcam   only beta; see `cam_libraries`
    memcpy                    a copy of A

The reference and its parameters have A's type.  That moves half as many bytes as autocast, which would keep
products of shape (N, C, L) in float32.  The library keeps parameters and small tensors in float32 for every
type of A.  To compile the reference, the caller sets `torch._dynamo.config.trace_autograd_ops`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure.parity import Outputs
from bench.suite import cam_libraries
from bench.suite.cases import CAM_LIBRARIES, FUSED_COMPILED, GRAPHED, Case
from ggam_fast import GGAMHead, GGAMLoss, GGAMOutput, functional
from ggam_fast.base import GGAMHeadBase
from ggam_fast.reference import GGAMHeadReference

NUM_CLASSES = 200
GUIDANCE_WEIGHT = 0.1
MODES = {
    "compiled": "default",
    "compiled_max_autotune": "max-autotune-no-cudagraphs",
    "compiled_reduce_overhead": "reduce-overhead",
    "compiled_closed_form": "default",
    "fused_compiled": "default",
    "fused_modular_compiled": "default",
    "fused_reduce_overhead": "reduce-overhead",
    GRAPHED: "default",
}


class Peer:
    """`peer(x, y)` is timed.  `peer.results(x, y)` is the same call and returns its outputs by name."""

    def __init__(self, call: Callable[[Tensor, Tensor], Any], name: str = "out", capturable: bool = True):
        self.call, self.name = call, name
        self.capturable = capturable  # whether a CUDA graph can hold the call
        self.replays = False  # whether the call replays its own CUDA graphs

    def __call__(self, x: Tensor, y: Tensor) -> Any:
        with torch.no_grad():
            if self.replays:
                torch.compiler.cudagraph_mark_step_begin()
            return self.call(x, y)

    def release(self, x: Tensor) -> None:
        """Free what an earlier call left in memory."""

    def gradient_bytes(self, x: Tensor) -> int:
        """Size of the gradients left by the last call."""
        return 0

    def results(self, x: Tensor, y: Tensor) -> Outputs:
        out = self(x, y)
        return out._asdict() if isinstance(out, GGAMOutput) else {self.name: out}


class Step(Peer):
    """Forward, loss and backward into A and all parameters."""

    def __init__(self, head: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]):
        super().__init__(loss_of)
        self.parameters = dict(head.named_parameters())

    def release(self, x: Tensor) -> None:
        x.grad = None
        for p in self.parameters.values():
            p.grad = None

    def gradient_bytes(self, x: Tensor) -> int:
        return sum(t.grad.nbytes for t in (x, *self.parameters.values()) if t.grad is not None)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.release(x)
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.call(x, y)
        loss.backward()
        return loss

    def results(self, x: Tensor, y: Tensor) -> Outputs:
        loss = self(x, y).detach()
        grads = {"features": x.grad, **{name: p.grad for name, p in self.parameters.items()}}
        missing = [name for name, grad in grads.items() if grad is None]
        if missing:
            raise AssertionError(f"no gradient reached {', '.join(missing)}")
        return {"loss": loss, **grads}  # type: ignore[dict-item]


class Graphed(nn.Module):
    """A guided loss that replays its forward and backward as CUDA graphs.

    The first call captures them on a copy of the features.
    """

    def __init__(self, head: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.head, self.loss_of = head, loss_of  # a submodule, so that its parameters get gradients
        self._captured = False

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if not self._captured:
            self._captured = True  # the capture calls this method
            torch.cuda.make_graphed_callables(self, (x.detach().clone().requires_grad_(), y.clone()))
        return super().__call__(x, y)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss_of(x, y)


def new_head(kind: type[GGAMHeadBase], case: Case, state: dict[str, Tensor] | None = None) -> Any:
    """A head for the case, in evaluation mode, with the `cam_norm` of the training command.

    With that `cam_norm` the guidance depends strongly on beta, so a wrong beta shows in the gradients and
    fails the parity check.
    """
    input_fmt = "NLC" if case.layout == "nlc" else "NCHW"
    head = kind(case.c, NUM_CLASSES, cam_norm="standardized", input_fmt=input_fmt)
    if state is not None:
        head.load_state_dict(state)
    return head.eval()


def build(provider: str, run: str, case: Case, state: dict[str, Tensor], device: torch.device) -> Peer:
    """The provider for one pass of one case, with these parameters."""
    if provider == "memcpy":
        return _memcpy()
    is_reference = provider in ("eager", *CAM_LIBRARIES) or provider.startswith("compiled")
    is_reference = is_reference and provider != "compiled_closed_form"
    head = new_head(GGAMHeadReference if is_reference else GGAMHead, case, state).to(device)
    if is_reference:
        head.to(case.dtype)
    if provider == "compiled_closed_form":
        head.backend = "torch"
    if provider in CAM_LIBRARIES:
        # A graph cannot hold hooks and targets on the host, and a failed capture also breaks later calls.
        return Peer(
            cam_libraries.build(provider, head, case.layout == "nlc"), "cam_weights", capturable=False
        )
    if run == "step":
        head.train()
        call = _compiled(provider, _loss(provider, head))
        peer: Peer = Step(head, Graphed(head, call) if provider == GRAPHED else call)
    else:
        name = {"fwd": "logits", "beta": "cam_weights"}.get(run, "out")
        peer = Peer(_compiled(provider, _forward(run, head)), name)
    if MODES.get(provider) == "reduce-overhead" or provider == GRAPHED:
        peer.replays, peer.capturable = True, False
    return peer


def _forward(run: str, head: nn.Module) -> Callable[[Tensor, Tensor], Any]:
    if run == "fwd":
        return lambda x, y: head(x)
    if run == "fwd_beta":
        return lambda x, y: head(x, y)
    return lambda x, y: head(x, y).cam_weights


def guided_loss(head: GGAMHead, x: Tensor, y: Tensor) -> Tensor:
    """The library's loss of the guided step in its fastest form."""
    return functional.fused_ggam_loss(head, x, y, guidance_weight=GUIDANCE_WEIGHT).loss


def _loss(provider: str, head: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if provider in ("fused", *FUSED_COMPILED, GRAPHED, "compiled_closed_form"):
        return lambda x, y: guided_loss(head, x, y)
    criterion = GGAMLoss(GUIDANCE_WEIGHT)
    return lambda x, y: criterion(head(x, y), y)


def _compiled(provider: str, call: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    if provider not in MODES:
        return call
    # Dynamo stops compiling a function after a few shapes, so this resets its count.
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, dynamic=False, mode=MODES[provider])


def _memcpy() -> Peer:
    targets: dict[tuple[int, ...], Tensor] = {}

    def copy(x: Tensor, y: Tensor) -> Tensor:
        target = targets.get(tuple(x.shape))
        if target is None:
            target = targets[tuple(x.shape)] = torch.empty_like(x)
        return target.copy_(x)

    return Peer(copy, "copy")
