"""What only a GPU can show in full.  On a CPU the same tests run for a few steps, to show that they work."""

import copy

import pytest
import torch
from torch import Tensor

from ggam_fast import GGAMHead, checks
from ggam_fast.functional import fused_ggam_loss

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

ON_GPU = torch.cuda.is_available()
N, C, H, W, K = (16, 256, 7, 7, 10) if ON_GPU else (2, 24, 2, 3, 3)
STEPS = 10_000 if ON_GPU else 10


def head_on(device: torch.device) -> GGAMHead:
    torch.manual_seed(0)
    head = GGAMHead(C, K, rd_channels=4, hidden_size=0, backend="triton")
    return head.to(device).eval()


def inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(N, C, H, W, generator=generator).to(device, dtype)
    return x, (torch.arange(N) % K).to(device)


def step(head: GGAMHead, x: Tensor, target: Tensor) -> list[Tensor]:
    """The loss, and all gradients."""
    leaf = x.detach().requires_grad_()
    loss, _ = fused_ggam_loss(head, leaf, target, guidance_weight=0.3)
    return [loss.detach(), *torch.autograd.grad(loss, [leaf, *head.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misaligned_slices(dtype: torch.dtype, device: torch.device) -> None:
    """The aligned kernels come first, so that a slice would find them if alignment were not in the key."""
    head, (x, target) = head_on(device), inputs(device, dtype)
    expected = step(head, x, target)
    for offset in (1, 2, 4, 8) if ON_GPU else (1,):
        buffer = torch.zeros(offset + x.numel(), dtype=dtype, device=device)
        moved = buffer[offset:].view(x.shape).copy_(x)
        assert moved.data_ptr() % 16 == (x.data_ptr() + offset * x.element_size()) % 16
        for _ in range(2):  # recorded, and replayed
            for found, one in zip(step(head, moved, target), expected, strict=True):
                torch.testing.assert_close(found, one)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus() -> None:
    """In turns, while the first one is current."""
    devices = [torch.device("cuda", i) for i in range(2)]
    heads, data = [head_on(d) for d in devices], [inputs(d) for d in devices]
    expected = step(heads[0], *data[0])
    for _ in range(3):
        for device, head, (x, target) in zip(devices, heads, data, strict=True):
            for found, one in zip(step(head, x, target), expected, strict=True):
                assert found.device == device
                torch.testing.assert_close(found.to(devices[0]), one)
    assert torch.cuda.current_device() == 0


def test_many_steps_without_drift(device: torch.device) -> None:
    """The last step has the bits of the first, and no memory is kept."""
    head, (x, target) = head_on(device), inputs(device)
    first, held = step(head, x, target), 0
    for i in range(1, STEPS):
        last = step(head, x, target)
        if i == STEPS // 10 and ON_GPU:
            held = torch.cuda.memory_allocated()
        if i % (STEPS // 10) == 0:
            assert all(torch.equal(a, b) for a, b in zip(last, first, strict=True)), f"step {i}"
    assert not ON_GPU or torch.cuda.memory_allocated() == held


def test_many_training_steps_as_on_the_torch_backend(device: torch.device) -> None:
    heads = [head_on(device).train()]
    heads.append(copy.deepcopy(heads[0]))
    heads[1].backend = "torch"
    x, target = inputs(device)
    losses = []
    for head in heads:
        optimizer = torch.optim.SGD(head.parameters(), 1e-3)
        for _ in range(STEPS):
            loss, _ = fused_ggam_loss(head, x, target, guidance_weight=0.3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    assert losses[0].isfinite()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)
