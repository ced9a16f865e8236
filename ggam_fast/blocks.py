"""Guidance for the attention of other blocks: SE, ECA, CBAM, and what is built like them.

    A: the block's input    gate: its channel attention, (N, C) in (0, 1)    S = gate / sum over channels
    beta = mean over positions of dy/dA        L_GGAM = divergence(S, norm(beta)), as in the head

Nothing of these blocks is known in closed form, so y is differentiated once, from the scores down to the
block.  The layers below the block are not touched by that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from . import checks
from .backends.torch import TORCH
from .base import GGAMOutput
from .entropy import reduce_batch
from .guidance import kl_guidance
from .precision import compute_dtype

CHANNEL_GATES, SPATIAL_GATES = ("channel.gate", "gate"), ("spatial.gate",)


def guide_block(
    model: nn.Module | Callable[[Tensor], Tensor],
    block: nn.Module,
    images: Tensor,
    target: Tensor,
    *,
    gate: nn.Module | None = None,
    cam_at: checks.CamAt = "features",
    cam_class: checks.CamClass = "label",
    cam_detach: bool = True,
    cam_norm: checks.CamNorm = "standardized",
    cam_temperature: float = 1.0,
    divergence: checks.Divergence = "symmetric",
    guidance_reduction: checks.Reduction | None = None,
    ignore_index: int | None = None,
) -> GGAMOutput:
    """Run `model(images)` and guide the channel attention of one of its blocks by Grad-CAM at that block.

        out = guide_block(model, model.layer4[-1].se, images, target)
        loss = GGAMLoss(guidance_weight=0.1)(out, target)

    Args:
        model: gives logits (N, K). `model(images)` must call `block` once, on maps (N, C, H, W) or
            (N, H, W, C).
        block: timm's SEModule, SqueezeExcite, EffectiveSEModule, EcaModule, CecaModule or CbamModule, or
            another module that multiplies its input by the output of its layer `gate` or `channel.gate`.
        images, target: as the model and the head take them.
        gate: the layer whose output is the channel attention, where it has another name.
        cam_at: "features" differentiates at the block's input, "attended" at its output.
        cam_class, cam_detach, cam_norm, cam_temperature, divergence, guidance_reduction, ignore_index: as in
            `GGAMHead`.

    Returns:
        The logits; S (N, C), the gate divided by its sum over channels; T (N, H, W), the output of
        `spatial.gate` (CBAM), or ones; beta (N, C); and the guidance loss (). The logits, S, T and the
        guidance loss have gradients.

    It costs a backward pass from the scores down to the block, for activations alone: none of the layers
    below it, and no gradients of parameters. A block right before pooling and a linear layer costs next to
    nothing. Two hooks are set and removed again; `torch.compile` of the model does not see them.

    Raises:
        TypeError, ValueError: an argument does not fit, the block has no gate, or the model does not call it.

    Source: arXiv 2101.09666 for L_GGAM; Selvaraju et al. (arXiv 1610.02391), eq. 1, for beta.
    """
    checks.one_of("cam_at", cam_at, checks.CAM_AT)
    checks.one_of("cam_class", cam_class, checks.CAM_CLASS)
    checks.one_of("cam_norm", cam_norm, checks.CAM_NORM)
    checks.one_of("divergence", divergence, checks.DIVERGENCE)
    temperature = checks.temperature(cam_temperature)
    reduction = checks.reduction("guidance_reduction", guidance_reduction, divergence)
    ignore_index = checks.label("ignore_index", ignore_index)
    if not isinstance(block, nn.Module):
        raise TypeError(f"block must be a module of the model; got {type(block).__name__}")
    grad_mode = torch.is_grad_enabled()
    with torch.enable_grad():
        logits, seen = _run(model, block, gate or _part(block, CHANNEL_GATES), images)
        checks.matrix("model(images)", logits, "of logits (N, K)")
        wide = logits.to(compute_dtype(logits))
        target = checks.target(target, logits.shape[0], logits.shape[1], ignore_index, logits.device)
        seed, share = TORCH.class_scores(wide.detach(), target, cam_class, ignore_index)
        (gradient,) = torch.autograd.grad(
            wide, [seen.input if cam_at == "features" else seen.output], seed,
            retain_graph=True, create_graph=grad_mode and not cam_detach,
        )  # fmt: skip
    gates, axis = _channels(seen.gate, seen.shape)
    with torch.set_grad_enabled(grad_mode):
        positions = [i for i in range(1, len(seen.shape)) if i != axis]
        beta = gradient.to(compute_dtype(gradient)).mean(positions)
        s = gates / gates.sum(1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
        log_s = s.clamp_min(torch.finfo(s.dtype).tiny).log()
        per_image = kl_guidance(log_s, beta, cam_norm, temperature, divergence)
        guidance = reduce_batch(per_image, reduction, share)
    size = [seen.shape[i] for i in positions]
    t = s.new_ones(s.shape[0], *size) if seen.spatial is None else seen.spatial.reshape(s.shape[0], *size)
    out = GGAMOutput(logits, s, t, beta, guidance)
    return out if grad_mode else GGAMOutput(*(x.detach() for x in out))


class _Seen:
    """What the hooks saw of the block."""

    input: GradientEdge
    output: GradientEdge
    shape: tuple[int, ...]
    gate: Tensor | None = None
    spatial: Tensor | None = None
    calls = 0


def _part(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    found = dict(block.named_modules())
    return next((found[name] for name in names if name in found), None)


def _run(model: Any, block: nn.Module, gate: nn.Module | None, images: Tensor) -> tuple[Tensor, _Seen]:
    if gate is None:
        raise TypeError(
            f"block must have a layer gate or channel.gate; got {type(block).__name__}: give gate=, the "
            "layer whose output is the channel attention"
        )
    seen = _Seen()

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = arguments
        seen.calls += 1
        # Of frozen layers below the block; and no leaf, which a block may change in place.
        x = x if x.requires_grad else x.detach().requires_grad_().view_as(x)
        seen.input, seen.shape = get_gradient_edge(x), tuple(x.shape)
        return (x, *rest)

    def after(module: nn.Module, arguments: Any, output: Tensor) -> None:
        # The edge, because a later layer may change the tensor in place.
        seen.output = get_gradient_edge(output)

    def keep(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: setattr(seen, name, output)

    spatial = _part(block, SPATIAL_GATES)
    hooks = [
        block.register_forward_pre_hook(before),
        block.register_forward_hook(after),
        gate.register_forward_hook(keep("gate")),
    ]
    if spatial is not None:
        hooks.append(spatial.register_forward_hook(keep("spatial")))
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if seen.calls != 1 or seen.gate is None:
        called = f"{seen.calls} times" if seen.calls != 1 else "once, without its gate"
        raise ValueError(f"model(images) must call block {type(block).__name__} once; it called it {called}")
    return logits, seen


def _channels(gate: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """The gate as (N, C), and the axis of the channels in the block's input."""
    assert gate is not None
    per_image = gate.numel() // max(shape[0], 1)
    axes = [i for i in (1, len(shape) - 1) if shape[i] == per_image]
    if gate.dim() == len(shape):  # (N, C, 1, 1) or (N, 1, 1, C)
        axes = [i for i in axes if gate.shape[i] == per_image]
    if not axes or gate.shape[0] != shape[0]:
        raise ValueError(
            f"gate must give one number for each image and channel of the block's input {shape}; got shape "
            f"{tuple(gate.shape)}"
        )
    gates = gate.reshape(shape[0], per_image)
    return gates.to(compute_dtype(gates)), axes[0]
