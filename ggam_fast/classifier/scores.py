"""Scores and v = d y / d pooled of any module, by autograd.

v comes from `torch.autograd.grad`, which a compiled step can only trace with
`torch._dynamo.config.trace_autograd_ops = True`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .rules import LayerGradient, Scores

_IN_PLACE = (
    "classifier must not change its input in place, where Grad-CAM takes the gradient; "
    "give its first layer inplace=False"
)


def custom_scores(classifier: Callable[[Tensor], Tensor], x: Tensor, detach: bool) -> Scores:
    """`scores_by_autograd`, for which torch.compile breaks its graph unless it is told to trace autograd."""
    if torch.compiler.is_dynamo_compiling() and not torch._dynamo.config.trace_autograd_ops:
        reason = "a custom classifier's Grad-CAM compiles with torch._dynamo.config.trace_autograd_ops = True"
        return torch._dynamo.disable(scores_by_autograd, reason=reason)(classifier, x, detach)
    return scores_by_autograd(classifier, x, detach)


def scores_by_autograd(classifier: Callable[[Tensor], Tensor], x: Tensor, detach: bool) -> Scores:
    """The same for any module: its forward runs once, v is autograd's, and so are the parameters' gradients,
    which are not given here.

    Raises ValueError if the module changes its input in place, where v would be another gradient; a
    compiled step cannot look and does not.
    """
    # Dynamo says the same of every compilation (torch 2.11).
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "torch.export cannot trace a custom classifier's class-score gradient, which is autograd's: "
            "export the head without target, or with Linear, BatchNorm1d, ELU, ReLU and Dropout layers alone"
        )
    needs_graph = torch.is_grad_enabled()
    eager = not torch.compiler.is_compiling()
    inference = eager and torch.is_inference_mode_enabled()

    def graph_allowed() -> AbstractContextManager[object]:
        return torch.inference_mode(False) if inference else nullcontext()

    with graph_allowed(), torch.enable_grad():
        x = x.clone() if inference else x
        if not (needs_graph and x.requires_grad):
            x = x.detach().requires_grad_()
        version = x._version if eager else 0
        try:
            logits = classifier(x)
        except RuntimeError as error:
            if x.is_leaf and "leaf Variable that requires grad" in str(error):
                raise ValueError(_IN_PLACE) from error
            raise
        if eager and x._version != version:
            raise ValueError(_IN_PLACE)

    def pull_one(seed: Tensor) -> Tensor:
        # The module may work in float16, where the cross entropy's small gradients would vanish.
        scale = power_of_two(seed.detach())
        with graph_allowed(), torch.enable_grad():
            (v,) = torch.autograd.grad(
                logits,
                x,
                (seed / scale).to(logits.dtype),
                retain_graph=needs_graph,
                create_graph=needs_graph and not detach,
            )
        return scale * (v.detach() if detach else v)

    def pull_back(seeds: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        return [pull_one(seed) for seed in seeds], []

    return Scores(logits if needs_graph else logits.detach(), pull_back)


def power_of_two(x: Tensor) -> Tensor:
    """The power of two below the largest |x|, (): dividing by it is exact.  1 for zeros and non-finite x."""
    largest = x.abs().amax() if x.numel() else x.new_ones(())
    exact = torch.exp2(torch.floor(torch.log2(largest)))
    return torch.where((largest > 0) & largest.isfinite(), exact, torch.ones_like(largest))
