"""The head against its peers: forward, forward with Grad-CAM weights, and the full guided step.

    pytest bench/                      # on the CPU: small cases, torch backend; on a GPU: all cases

Peers, on the same inputs and parameters, with loss and feature gradients compared before anything is timed:
    eager      the reference, Grad-CAM by a second backward pass
    compiled   the reference under torch.compile with trace_autograd_ops, which makes that pass compile
    fused      this library
    fused_compiled   this library inside torch.compile(fullgraph=True)
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ggam_fast import GGAMHead, GGAMLoss
from ggam_fast.reference import GGAMHeadReference

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# (N, C, H, W): EfficientNet and ResNet-50 at 224 in float32 on a CPU; the paper's sizes on a GPU.
CASES = (
    [(n, *shape) for n in (32, 128, 256) for shape in ((2048, 14, 14), (512, 28, 28), (512, 14, 14))]
    if CUDA
    else [(32, 1280, 7, 7), (16, 2048, 14, 14)]
)
DTYPE = torch.bfloat16 if CUDA else torch.float32
NUM_CLASSES = 200
PROVIDERS = ("eager", "compiled", "fused", "fused_compiled")
Step = Callable[[], Any]


def build(provider: str, run: str, features: Tensor, target: Tensor, state: dict[str, Tensor]) -> Step:
    """One call of `run`: "fwd", "fwd_beta" or "step"."""
    kind = GGAMHeadReference if provider in ("eager", "compiled") else GGAMHead
    head = kind(features.shape[1], NUM_CLASSES).to(DEVICE)
    head.load_state_dict(state)
    head.train(run == "step")
    loss_fn = GGAMLoss(guidance_weight=0.1)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(head(x, y), y)

    def scores_of(x: Tensor, y: Tensor) -> Any:
        return head(x) if run == "fwd" else head(x, y)

    call: Callable[[Tensor, Tensor], Any] = loss_of if run == "step" else scores_of
    if provider.endswith("compiled"):
        call = torch.compile(call, fullgraph=True)

    def step() -> Any:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            if run != "step":
                with torch.no_grad():
                    return call(features, target)
            head.zero_grad(set_to_none=True)
            features.grad = None
            loss = call(features, target)
            loss.backward()
            return loss.detach(), features.grad

    return step


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("run", ["fwd", "fwd_beta", "step"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "x".join(map(str, c)))
def bench_head(benchmark: Any, case: tuple[int, ...], layout: str, run: str, provider: str) -> None:
    if not CUDA and layout == "channels_last" and provider.endswith("compiled"):
        pytest.skip("compiled peers run in one layout on the CPU: each compilation takes half a minute")
    torch.manual_seed(0)
    format_ = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    features = torch.randn(case, device=DEVICE, dtype=DTYPE).relu_().contiguous(memory_format=format_)
    features.requires_grad_(run == "step")
    target = torch.randint(NUM_CLASSES, (case[0],), device=DEVICE)
    state = GGAMHeadReference(case[1], NUM_CLASSES).to(DEVICE).state_dict()
    expected = flat(build("eager", run, features, target, state)())
    expected = [x.detach().clone() for x in expected]
    step = build(provider, run, features, target, state)
    for found, reference in zip(flat(step()), expected, strict=True):
        error = (found.double() - reference.double()).norm() / reference.double().norm()
        assert error < (0.1 if CUDA else 1e-3), f"{provider} disagrees with the reference by {error:.1e}"

    def timed() -> None:
        step()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"{run} {'x'.join(map(str, case))} {layout} {DTYPE}"
    benchmark.extra_info.update(provider=provider, device=torch.cuda.get_device_name() if CUDA else "cpu",
                                threads=torch.get_num_threads(), torch=torch.__version__)  # fmt: skip
    benchmark.pedantic(timed, rounds=15, warmup_rounds=3)
