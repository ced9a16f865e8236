"""One guided step in closed form.  The drop-in form pulls back one gradient at a time, the fused loss two.

    loss = CE(logits, target) + guidance_weight * L_GGAM(S, beta)

Once the classifier has run, both gradients of the pooled features are known in closed form:

    v  = d y / d pooled        for beta        (y is the score that Grad-CAM explains)
    dz = d CE / d pooled       for dA          (with beta detached, L_GGAM reaches A through S alone)

The fused loss pulls both through A together (`closed_form.pull_back_to_channels`) and keeps the small factors
of dA and of the parameters' gradients.  (Autograd computes the gradients of a custom classifier.)  Its
backward multiplies the factors out, times the incoming gradient, and does not read A again.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .autograd import Attention, Function, Guidance, HeldGradient, batched, forward_mode
from .backends.registry import full_precision, get_backend, get_differentiable
from .backends.torch import (
    TORCH,
    Backend,
    Guided,
    PositionGuidance,
    PositionPull,
    PositionTerms,
    cam_weights,
)
from .base import GGAMOutput, output_of, values_of
from .classifier.rules import Scores, scores
from .closed_form import (
    Attended,
    ChannelMLP,
    Held,
    Options,
    attend,
    cam_terms,
    cam_terms_of,
    class_map,
    held_features_grad,
    held_layer_grads,
    hold,
    like_parameters,
    pull_back,
    pull_back_to_channels,
    pull_back_to_mean,
)
from .entropy import cross_entropy, reduce_batch
from .guidance import kl_positions
from .layer import Layer, LayerGradient, Link, chain_of
from .precision import as_type, compute_dtype


def ggam_attention(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    backend: str,
    differentiable: bool = False,
) -> Attended:
    """`attend` with gradients if they are enabled.

    It runs as one node, or with `differentiable` through the contractions.
    """
    with full_precision(features):
        if differentiable or forward_mode():
            return attend(get_differentiable(backend), features, mlp, options)
        if not torch.is_grad_enabled():
            return attend(get_backend(backend), features, mlp, options)
        return Attended(*Attention.apply(features, *mlp, *options, backend))


def grad_cam_weights(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    cam_at: str,
    backend: str,
    differentiable: bool = False,
    terms: PositionTerms | None = None,
) -> tuple[Tensor, PositionGuidance | None]:
    """beta (N, C) for features (N, C, L), given v = `grad_pooled` = dy/dpooled (dy/dD if dense).

    With `differentiable`, beta has derivatives of every order; otherwise it is detached.  With `terms` also
    the guidance of T, which is always detached.
    """
    graph = nullcontext() if differentiable else torch.no_grad()
    forward = differentiable or forward_mode()
    stages = get_differentiable(backend) if forward else get_backend(backend)
    with graph, full_precision(features):
        of_beta, s, guided = cam_terms_of(
            stages, features, mlp, options, attended, grad_pooled, cam_at, terms
        )
        beta = cam_weights(of_beta, s, features.shape[2])
        return beta if differentiable else beta.detach(), guided  # of forward mode too


class LossTerms(NamedTuple):
    """The options of the guidance and the loss, already checked."""

    cam_at: str
    cam_class: str
    cam_norm: str
    divergence: str
    guidance_reduction: str
    ignore_index: int | None
    cam_temperature: float
    guidance_weight: float = 1.0
    label_smoothing: float = 0.0
    position_temperature: float = 1.0
    position_weight: float = 1.0

    def of_positions(
        self, options: Options, attended: Attended, share: Tensor | None
    ) -> PositionTerms | None:
        """What the guidance of T needs, or None if T is not guided."""
        if not options.guides_positions:
            return None
        return PositionTerms(
            options.position_guidance, self.position_temperature, attended.log_spatial, share
        )


class Inputs(NamedTuple):
    """A call of a head, checked: what the equations need of it."""

    x: Tensor  # features (N, C, L)
    shape: tuple[int, ...]  # the spatial shape
    mlp: ChannelMLP
    options: Options
    backend: str
    layers: list[Layer] | None  # None: a custom classifier
    target: Tensor | None = None
    terms: LossTerms | None = None


def cam_and_guidance(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    attended: Attended,
    grad_pooled: Tensor,
    share: Tensor | None,
    backend: str,
    terms: LossTerms,
) -> tuple[Tensor, ...]:
    """beta (N, C), detached, S (N, C), and the guidance loss, reduced over the images that count.

    If T is guided, also the position loss.
    """
    stages, positions, logits = get_backend(backend), features.shape[2], attended.channel_logits
    norm = (terms.cam_norm, terms.cam_temperature, terms.divergence)
    mean = terms.guidance_reduction == "mean"
    needs_graph = torch.is_grad_enabled()
    with torch.no_grad(), full_precision(features):
        beta_terms, _, guided = cam_terms_of(
            stages, features, mlp, options, attended, grad_pooled, terms.cam_at,
            terms.of_positions(options, attended, share),
        )  # fmt: skip
        if not needs_graph and terms.guidance_reduction != "none":
            found = stages.guided_loss(
                logits, beta_terms, None, positions, *norm, 1.0, mean, share, None,
                None if guided is None else guided.losses,
            )  # fmt: skip
            rest = [] if found.positions is None else [found.positions]
            return found.cam_weights, found.channel, found.guidance, *rest
    with full_precision(features):
        beta, s, per_image = Guidance.apply(logits, *beta_terms, positions, norm, backend)[:3]
        guidance = reduce_batch(per_image, terms.guidance_reduction, share)
        rest = [] if guided is None else [position_loss(guided, attended, share, terms.guidance_reduction)]
        return beta, s, guidance, *rest


def position_loss(
    guided: PositionGuidance, attended: Attended, share: Tensor | None, reduction: str = "mean"
) -> Tensor:
    """KL(q, T), with derivatives of every order for constant q.

    It is the mean over the images that count, and (N,) if the guidance's `reduction` is "none".
    """
    per_image = kl_positions(guided.target, attended.log_spatial)
    return reduce_batch(per_image, "none" if reduction == "none" else "mean", share)


class Seen(NamedTuple):
    """The results of the drop-in form's forward that its backward needs."""

    attended: Attended
    links: list[Link]
    given: list[tuple[Tensor, ...]]  # of each link, see `Backend.chain`
    grad_logits: Tensor | None  # (N, C): de of the guidance loss
    pull: PositionPull | None = None  # of T to its target


def drop_in_forward(
    stages: Backend,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    layers: Sequence[Layer],
    target: Tensor | None,
    terms: LossTerms | None,
    mean: Tensor | None = None,
    classes: int | None = None,
) -> tuple[GGAMOutput, Seen]:
    """The head's output for known layers, without a graph.  Without a target only the logits are valid.

    `mean` (N, C) is the mean of A over positions; None computes it.  With `classes` the number of scores is
    checked.
    """
    links = chain_of(layers)
    attended = attend(stages, features, mlp, options, mean)
    logits, given = stages.chain(links, attended.pooled)
    if classes is not None:
        checks.scores(logits, features.shape[0], classes)
    if terms is None or target is None:
        out = GGAMOutput(logits, *[attended.spatial] * 4)  # placeholders
        return out, Seen(attended, links, given, None)
    seed, share = stages.class_scores(logits, target, terms.cam_class, terms.ignore_index)
    (v,), _ = stages.chain_grad(links, given, [seed])
    beta_terms, _, guided = cam_terms_of(
        stages, features, mlp, options, attended, v, terms.cam_at,
        terms.of_positions(options, attended, share),
    )  # fmt: skip
    found = stages.guided_loss(
        attended.channel_logits, beta_terms, None, features.shape[2], terms.cam_norm, terms.cam_temperature,
        terms.divergence, 1.0, terms.guidance_reduction == "mean", share, None,
        None if guided is None else guided.losses,
    )  # fmt: skip
    out = _output(logits, attended, found)
    pull = None if guided is None else PositionPull(guided.target, share)
    return out, Seen(attended, links, given, found.grad_logits, pull)


def _output(logits: Tensor, attended: Attended, found: Guided) -> GGAMOutput:
    positions = [] if found.positions is None else [found.positions]
    return output_of([
        logits, found.channel, attended.spatial, found.cam_weights, found.guidance, *positions,
    ])  # fmt: skip


def drop_in_again(
    inputs: Inputs, grads: Sequence[Tensor | None], wanted: Sequence[Tensor | None]
) -> list[Any]:
    """The backward of the drop-in form by autograd, for derivatives of every order.

    `grads` are those of logits, S, T (N, L), beta, the guidance loss and, if T is guided, the position loss;
    or of logits alone.  `wanted` are tensors of `inputs`; a gradient that is not needed is None.  The forward
    runs again, so no layer may be random.  Running statistics do not move.
    """
    x, _, mlp, options, backend, given, target, terms = inputs
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        layers = [
            layer._replace(running_mean=None, running_var=None, tracked=None) if layer.training else layer
            for layer in given or ()
        ]
        attended = ggam_attention(x, mlp, options, backend)
        result = scores(layers, attended.pooled, True, backend)
        outputs = [result.logits]
        if terms is not None and target is not None:
            seed, share = TORCH.class_scores(result.logits, target, terms.cam_class, terms.ignore_index)
            (v,), _ = result.pull_back([seed])
            beta, s, *losses = cam_and_guidance(x, mlp, options, attended, v, share, backend, terms)
            outputs += [s, attended.spatial, beta, *losses]
        pairs = [(y, dy) for y, dy in zip(outputs, grads, strict=True) if dy is not None and y.requires_grad]
        needed = [t for t in wanted if t is not None and t.requires_grad]
        if not pairs or not needed:
            return [None] * len(wanted)
        ys, dys = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, needed, dys, create_graph=graph, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in wanted]


def drop_in_factors(
    stages: Backend,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    seen: Seen,
    grad_logits: Tensor,
    grad_guidance: Tensor | None = None,
    grad_channel: Tensor | None = None,
    grad_spatial: Tensor | None = None,
    grad_positions: Tensor | None = None,
) -> Held:
    """The factors of all gradients, given those of the logits, the guidance and position loss, S and T."""
    attended = seen.attended
    (dz,), layers = stages.chain_grad(seen.links, seen.given, [grad_logits])
    de, scale = seen.grad_logits, grad_guidance
    if grad_channel is not None:
        assert attended.channel is not None
        de, scale = stages.softmax_grad(grad_channel, attended.channel, de, scale), None
    pull = None
    if seen.pull is not None and grad_positions is not None:
        pull = PositionPull(*seen.pull[:3], grad_positions)
    f = pull_back(stages, features, mlp, options, attended, dz, de, grad_spatial, scale, pull)
    return hold(mlp, attended, f, layers)


class FusedLoss(NamedTuple):
    """The result of `functional.fused_ggam_loss`."""

    loss: Tensor
    """() the only output with a gradient"""
    out: GGAMOutput
    """logits, attention, beta and guidance loss, detached"""


def _alone(x: Tensor) -> Tensor:
    """x, copied if it is a view of a larger tensor, which the view would keep in memory."""
    if torch.compiler.is_compiling() or (x._base is not None and x._base.numel() > x.numel()):
        return x.clone()
    return x


def _smaller(backend: Backend, layers: Sequence[LayerGradient]) -> list[LayerGradient]:
    """The layers, with the gradients themselves in place of factors that are no smaller.

    A symbolic batch size keeps the factors, because a comparison would fix the size.
    """

    def shrinks(layer: LayerGradient) -> bool:
        weight, _, left, right, product = layer
        symbolic = torch.compiler.is_compiling() or not isinstance(left.shape[0], int)
        if symbolic or not product or weight is None or not weight.requires_grad:
            return False
        return left.shape[1] * right.shape[1] <= left.numel() + right.numel()

    chosen = [shrinks(layer) for layer in layers]
    found = iter(
        backend.layer_grads([(layer.left, layer.right) for layer, c in zip(layers, chosen, strict=True) if c])
    )
    return [
        LayerGradient(layer.weight, layer.bias, *next(found), product=False) if c else layer
        for layer, c in zip(layers, chosen, strict=True)
    ]


class Fused(NamedTuple):
    """The results of the fused loss's forward."""

    out: GGAMOutput
    guided: Guided
    held: Held
    given: list[tuple[Tensor, ...]]  # of each link of known layers, see `Backend.chain`


def drop_in(inputs: Inputs, classes: int) -> GGAMOutput:
    """`drop_in_forward` with gradients if they are enabled, as one node; T has the spatial shape."""
    x, layers = inputs.x, inputs.layers
    assert layers is not None
    parameters = [*inputs.mlp, *(p for layer in layers for p in (layer.weight, layer.bias))]
    found = DropInNode.apply(inputs._replace(x=torch.empty(0)), classes, x, *parameters)
    if inputs.terms is None:
        return GGAMOutput(*found * 5)
    logits, s, t, *rest = found
    return output_of([logits, s, t.unflatten(1, inputs.shape), *rest])


class DropInNode(Function):
    """`drop_in_forward` as one node: the values of the output, or (logits,); beta is constant."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Inputs, classes: int, features: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        _, _, mlp, options, backend, layers, target, terms = inputs
        assert layers is not None
        with torch.no_grad(), full_precision(features):
            stages = get_backend(backend)
            out, seen = drop_in_forward(
                stages, features, mlp, options, layers, target, terms, classes=classes
            )
        ctx.save_for_backward(features, seen.attended.spatial, *parameters)
        # T is an output, and a node that holds its own output is never freed.
        gone = torch.empty(0)
        seen = seen._replace(attended=seen.attended._replace(spatial=gone, log_spatial=gone))
        ctx.inputs, ctx.seen, ctx.shape = inputs, seen, out.logits.shape
        ctx.set_materialize_grads(False)
        if terms is None:
            return (out.logits,)
        constant = [out.cam_weights]
        constant += [] if options.uses_channel else [out.channel_attention, out.guidance_loss]
        constant += [] if options.uses_spatial else [out.spatial_attention]
        ctx.mark_non_differentiable(*constant)
        return values_of(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        features, t, *saved = ctx.saved_tensors
        inputs: Inputs = ctx.inputs._replace(x=features)
        if torch.is_grad_enabled() or any(map(batched, grads)):
            return None, None, *_again(inputs, saved, grads)
        mlp, options, seen = inputs.mlp, inputs.options, ctx.seen
        seen = seen._replace(attended=seen.attended._replace(spatial=t))
        of_logits, *others = grads
        of_s, of_t, _, of_guidance, of_positions = (*others, *[None] * 5)[:5]
        if of_logits is None:
            of_logits = features.new_zeros(ctx.shape, dtype=compute_dtype(features))
        if of_guidance is None and seen.grad_logits is not None:
            of_guidance = of_logits.new_zeros(())
        with full_precision(features):
            stages = get_backend(inputs.backend)
            held = drop_in_factors(
                stages, features, mlp, options, seen, of_logits, of_guidance, of_s, of_t, of_positions
            )
            da = held_features_grad(stages, features, options, held) if ctx.needs_input_grad[2] else None
            found: dict[int, Tensor] = {}
            if any(ctx.needs_input_grad[3:]):
                for layer, pair in zip(held.layers, held_layer_grads(stages, held), strict=True):
                    for p, g in zip((layer.weight, layer.bias), pair, strict=True):
                        if p is not None:  # a parameter may belong to two layers
                            found[id(p)] = g if id(p) not in found else found[id(p)] + g
        assert inputs.layers is not None
        parameters = [*mlp, *(p for layer in inputs.layers for p in (layer.weight, layer.bias))]
        pulled = [None if p is None else found.pop(id(p), None) for p in parameters]
        return None, None, da, *like_parameters(pulled, parameters)


def _again(
    inputs: Inputs, parameters: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """`drop_in_again` for the features and the parameters, each with a graph of its own."""
    with torch.enable_grad():
        x, *twins = (None if t is None else t.view_as(t) for t in (inputs.x, *parameters))
    assert x is not None
    left = iter(twins[4:])
    layers = [layer._replace(weight=next(left), bias=next(left)) for layer in inputs.layers or ()]
    again = inputs._replace(x=x, mlp=ChannelMLP(*twins[:4]), layers=layers)
    return drop_in_again(again, grads, [x, *twins])


def fused_forward(
    stages: Backend,
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    classifier: Sequence[Layer] | Callable[[Tensor], Scores],
    target: Tensor,
    terms: LossTerms,
    mean: Tensor | None = None,
    classes: int | None = None,
) -> Fused:
    """The forward of the fused loss, with both gradients pulled back.

    `classifier` is a list of known layers, or a function that scores the pooled features.  `mean` (N, C) is
    the mean of A over positions; None computes it.  With `classes` the number of scores is checked.  Nothing
    has a graph except the scores of a function, which also runs under the caller's autocast.
    """
    alone, positions = full_precision(features), features.shape[2]
    given: list[tuple[Tensor, ...]] = []
    scored, links = None, None if callable(classifier) else chain_of(classifier)
    with torch.no_grad(), alone:
        attended = attend(stages, features, mlp, options, mean)
        if links is not None:
            logits, given = stages.chain(links, attended.pooled)
    if callable(classifier):
        scored = classifier(attended.pooled)
        logits = scored.logits
    if classes is not None:
        checks.scores(logits, features.shape[0], classes)
    out_logits = logits
    with torch.no_grad(), alone:
        if scored is not None:
            logits = as_type(logits.detach(), compute_dtype(logits))
        entropy = stages.cross_entropy(
            logits, target, terms.label_smoothing, terms.cam_class, terms.ignore_index
        )
        if links is not None:
            pulled, layers = stages.chain_grad(links, given, [entropy.score, entropy.grad])
    if scored is not None:
        with torch.no_grad():
            pulled, layers = scored.pull_back([entropy.score, entropy.grad])
    with torch.no_grad(), alone:
        at_features = terms.cam_at == "features"
        of_positions, guided_t, pull = terms.of_positions(options, attended, entropy.share), None, None
        if of_positions is not None and not at_features:
            guided_t = stages.position_guidance(
                class_map(stages, features, options, attended, pulled[0]), of_positions
            )
            pull = PositionPull(guided_t.target, entropy.share, terms.position_weight)
        *pulled_v, pulled_z = pull_back_to_channels(
            stages, features, options, attended, pulled if at_features else pulled[1:], None, pull,
            of_positions if at_features else None, terms.position_weight,
        )  # fmt: skip
        if at_features:
            (pulled_y,) = pulled_v
            guided_t = pulled_y.positions
            ds = pulled_y.grad_channel
            de = None if ds is None else stages.softmax_grad(ds, pulled_y.softmax)
            beta_terms = cam_terms(pull_back_to_mean(stages, mlp, attended, pulled_y, de), attended)
        else:
            beta_terms, *_ = cam_terms_of(stages, features, mlp, options, attended, pulled[0], terms.cam_at)
        guided = stages.guided_loss(
            attended.channel_logits, beta_terms, pulled_z.grad_channel, positions, terms.cam_norm,
            terms.cam_temperature, terms.divergence, terms.guidance_weight,
            terms.guidance_reduction == "mean", entropy.share, entropy.losses,
            None if guided_t is None else guided_t.losses, terms.position_weight,
        )  # fmt: skip
        de = guided.grad_logits if options.uses_channel else None
        held = hold(mlp, attended, pull_back_to_mean(stages, mlp, attended, pulled_z, de), layers)
    out = _output(out_logits, attended, guided)
    return Fused(out, guided, held, given)


def held_loss(
    features: Tensor,
    options: Options,
    backend: str,
    entropy: Tensor,
    guidance: Tensor | None,
    held: Held,
    terms: LossTerms,
) -> Tensor:
    """entropy + guidance_weight * guidance, or `entropy` alone, as one node that holds its gradients."""
    f, weights, peak_index, layers = held
    stages = get_backend(backend)
    with torch.no_grad(), full_precision(features):
        layers = _smaller(stages, layers)
    return HeldGradient.apply(
        entropy, guidance, features, _alone(f.first), f.channel, f.grad_map, f.grad_mean, weights, peak_index,
        terms.guidance_weight, tuple(options), backend, tuple(layer.product for layer in layers),
        *(x for layer in layers for x in layer[:4]),
    )  # fmt: skip


def fused_loss(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    backend: str,
    classifier: Sequence[Layer] | Callable[[Tensor], Scores],
    target: Tensor,
    terms: LossTerms,
    classes: int | None = None,
) -> FusedLoss:
    """`functional.fused_ggam_loss` of features (N, C, L); see `fused_forward` for `classifier`.

    The cross entropy of scores from a function keeps its graph for autograd.
    """
    found = fused_forward(
        get_backend(backend), features.detach(), mlp, options, classifier, target, terms, classes=classes
    )
    out, guidance, entropy = found.out, None, found.guided.loss
    if callable(classifier):
        logits = as_type(out.logits, compute_dtype(out.logits))
        entropy = cross_entropy(logits, target, terms.label_smoothing, terms.ignore_index)
        guidance = found.guided.guidance
        if found.guided.positions is not None:
            entropy = entropy + terms.position_weight * found.guided.positions
    loss = held_loss(features, options, backend, entropy, guidance, found.held, terms)
    logits, *rest = values_of(out)
    return FusedLoss(loss, output_of([logits.detach(), *rest]))
