"""Which operations of torch count as launches."""

import torch
from torch import Tensor

from bench.measure.torch_launches import torch_launches


def test_what_of_torch_is_a_launch() -> None:
    x = torch.rand(4, 6, requires_grad=True)

    def launches_nothing() -> Tensor:
        return torch.empty_like(x.detach()).view(24)[2:].unflatten(0, (2, 11)).t().expand(3, 11, 2)

    assert torch_launches(launches_nothing) == 0
    assert torch_launches(lambda: x.softmax(1).mean().item()) == 3
    assert torch_launches(lambda: torch.zeros(3).clone().add_(1)) == 3
    # these are the product, the sum, the first gradient and the product's gradient
    assert torch_launches(lambda: torch.autograd.grad((x * 2).sum(), x)) == 4
