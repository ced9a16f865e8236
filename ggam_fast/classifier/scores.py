"""Scores and v = d y / d pooled of any module, by autograd.

v comes from `torch.autograd.grad`.  torch.compile traces it only with
`torch._dynamo.config.trace_autograd_ops = True`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .rules import LayerGradient, Scores

_NO_DERIVATIVE = ("is not implemented", "not have been used in the graph", "does not require grad")


def custom_scores(
    classifier: Callable[[Tensor], Tensor], x: Tensor, detach: bool, name: str = "classifier"
) -> Scores:
    """`scores_by_autograd`, with a graph break in torch.compile unless it may trace autograd."""
    if torch.compiler.is_dynamo_compiling() and not torch._dynamo.config.trace_autograd_ops:
        reason = (
            f"Grad-CAM through a custom {name} compiles with torch._dynamo.config.trace_autograd_ops = True"
        )
        return torch._dynamo.disable(scores_by_autograd, reason=reason)(classifier, x, detach, name)
    return scores_by_autograd(classifier, x, detach, name)


def scores_by_autograd(
    classifier: Callable[[Tensor], Tensor], x: Tensor, detach: bool, name: str = "classifier"
) -> Scores:
    """Scores and v of any module, whose forward runs once.  Errors call it by `name`.

    Autograd computes v.  It also computes the parameters' gradients, so the pullback returns none.
    Raises ValueError if the module changes its input in place, because v would then be a wrong gradient.
    A compiled step does not check this.
    """
    # is_exporting() is also True in every compilation by Dynamo (torch 2.11).
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            f"torch.export cannot trace the class-score gradient of a custom {name}: export the head "
            "without target, or with a classifier of Linear, BatchNorm1d, ELU, ReLU and Dropout layers"
            + (" and plain Linear layers as fc1 and fc2" if name != "classifier" else "")
        )
    in_place = (
        f"{name} must not change its input in place, because Grad-CAM takes the gradient there: "
        "give its first layer inplace=False"
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
                raise ValueError(in_place) from error
            raise
        if eager and x._version != version:
            raise ValueError(in_place)

    def pull_one(seed: Tensor) -> Tensor:
        # The module may compute in float16, in which the cross entropy's small gradients would be zero.
        scale = power_of_two(seed.detach())
        with graph_allowed(), torch.enable_grad():
            try:
                (v,) = torch.autograd.grad(
                    logits,
                    x,
                    (seed / scale).to(logits.dtype),
                    retain_graph=needs_graph,
                    create_graph=needs_graph and not detach,
                )
            except RuntimeError as error:
                if not any(hint in str(error) for hint in _NO_DERIVATIVE):
                    raise
                raise RuntimeError(
                    f"{name} has no derivative, which Grad-CAM needs (a quantized layer often has none): "
                    "call the head without target"
                ) from error
        return scale * (v.detach() if detach else v)

    def pull_back(seeds: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[LayerGradient]]:
        return [pull_one(seed) for seed in seeds], []

    return Scores(logits if needs_graph else logits.detach(), pull_back)


def power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below the largest |x|, (), an exact divisor.  1 for zeros or non-finite x."""
    largest = x.abs().amax() if x.numel() else x.new_ones(())
    exact = torch.exp2(torch.floor(torch.log2(largest)))
    return torch.where((largest > 0) & largest.isfinite(), exact, torch.ones_like(largest))
