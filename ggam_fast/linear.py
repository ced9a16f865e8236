"""A linear layer on the stages' products, as one autograd node:

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum_n dy_n

torch's own would follow its TF32 switches on a GPU, which these products do not.
"""

from typing import Any

import torch
from torch import Tensor

from .autograd import Function
from .checks import full_precision
from .contractions import get_stages
from .stages import Stages


class Linear(Function):
    """x (N, C), W (J, C) and b (J,) or None, of one type -> y (N, J)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return get_stages(backend).product([x], weight.t(), bias)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.backend = inputs[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        # torch's operations have derivatives of every order.
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        stages = Stages() if again else get_stages(ctx.backend)
        with full_precision(x):
            if ctx.needs_input_grad[0]:
                (dx,) = stages.product([dy], weight)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                ((dw, db),) = stages.layer_grads([(dy, x)])
        return dx, dw if ctx.needs_input_grad[1] else None, db if ctx.needs_input_grad[2] else None, None
