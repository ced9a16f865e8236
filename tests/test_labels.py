"""A label has the same answer in every form of a step, on both backends, eager, recorded and compiled.

The table of `ANSWERS`: a label outside [0, K) is an error, -100 too, unless it is `ignore_index`.  An ignored
image has no loss and no gradient, and does not count in the mean.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ggam_fast import GGAMHead, GGAMLoss, checks
from ggam_fast.functional import fused_ggam_loss

if not checks.TRITON_AVAILABLE:
    pytest.skip("needs triton", allow_module_level=True)

from ggam_fast import recorded

C, K = 12, 5
RECORDED = ("recorded", "unrecorded")
# (ignore_index, label of the third image): whether it is an error.
ANSWERS = {
    (None, 0): False,
    (None, K - 1): False,
    (None, -1): True,
    (None, K): True,
    (None, -100): True,
    (None, 2**40): True,
    (-100, 0): False,
    (-100, -100): False,
    (-100, -1): True,
    (-100, K): True,
    (2, 2): False,
    (2, -100): True,
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    recorded.enabled = True


def step_of(form: str, backend: str, ignore_index: int | None) -> Callable[[Tensor, Tensor], Tensor]:
    torch.manual_seed(0)
    head = GGAMHead(C, K, rd_channels=3, hidden_size=0, backend=backend, ignore_index=ignore_index).eval()
    criterion = GGAMLoss(0.3, ignore_index=ignore_index)
    if form == "fused":
        return lambda x, target: fused_ggam_loss(head, x, target, guidance_weight=0.3)[0]
    return lambda x, target: criterion(head(x, target), target)


def answers(step: Callable[[Tensor, Tensor], Tensor], ignore_index: int | None, times: int) -> None:
    """Each row of the table for this `ignore_index`."""
    x = torch.rand(4, C, 2, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for _ in range(times):
        for (ignored, label), wrong in ANSWERS.items():
            if ignored != ignore_index:
                continue
            target = torch.tensor([0, 1, label, 3])
            if wrong:
                with pytest.raises(
                    (ValueError, RuntimeError), match=r"target must be in|index out of bounds"
                ):
                    step(x, target)
                continue
            counted = [i for i in range(4) if target[i] != ignored]
            some = x.detach()[counted].requires_grad_()
            expected = step_of("drop_in", "torch", None)(some, target[counted])
            loss = step(x, target)
            (found,) = torch.autograd.grad(loss, x)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(found[counted], torch.autograd.grad(expected, some)[0])
            assert len(counted) == 4 or not found[2].any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="an assertion on the device ends the process")
@pytest.mark.parametrize("ignore_index", [None, -100, 2])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("form", ["drop_in", "fused"])
@pytest.mark.parametrize("how", [*RECORDED, "compiled"])
def test_labels(how: str, form: str, backend: str, ignore_index: int | None) -> None:
    recorded.enabled = how == "recorded"
    step, times = step_of(form, backend, ignore_index), 1
    if how == "recorded":
        times = 2  # the second time it is replayed
    elif how == "compiled":
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    answers(step, ignore_index, times)
