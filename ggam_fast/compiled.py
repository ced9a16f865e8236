"""A head's steps under `torch.compile` on the Triton backend: one operator forward and one backward.

    ggam_fast::guided_step, guided_step_grads      the fused loss
    ggam_fast::drop_in_step, drop_in_step_grads    the drop-in form, and logits alone

The forward replays a recording, as an eager step does.  Inductor fuses the mean of A into the code that makes
A, and the outer products of dA into the code that uses dA, so both stay torch operations outside of the
operators.  Running statistics are updated outside too, from the statistics of the batch.  The backward makes
the gradients of all parameters, and in the drop-in form also the factors of dA.  The cross entropy of
`GGAMLoss` stays a torch operation.
"""

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_true

from . import recorded, step
from .autograd import Function
from .backends.registry import full_precision, get_backend
from .backends.triton.launch import NotRecordable, Number, Recorder, plan
from .backends.triton.record import Pass, Recording
from .backends.triton.register import define
from .base import GGAMOutput, output_of, values_of
from .closed_form import ChannelMLP, Options, held_grads, held_layer_grads
from .layer import BATCH_NORM, DROPOUT, ELU, LINEAR, RELU, Layer
from .norm import move
from .step import FusedLoss, LossTerms

_TENSORS = ("weight", "bias", "running_mean", "running_var")


def applies(
    features: Tensor, mlp: ChannelMLP, options: Options, layers: Sequence[Layer] | None, target: Tensor | None
) -> bool:
    """Whether the operator takes this head.  A head that it does not take is compiled stage by stage."""
    # Not is_exporting(): it is True whenever Dynamo of torch 2.11 traces.
    if layers is None or options.pool_type != "avg" or torch.compiler._is_exporting_flag:
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    batch, width, positions = features.shape
    # A batch of unknown size may be empty.
    if torch.version.hip is not None or guard_or_true(batch == 0) or positions == 1:
        return False
    if plan.channels_block(width) is None:
        return False
    if any(layer.kind == DROPOUT and layer.training and layer.p for layer in layers):
        return False
    if target is not None and target.is_floating_point() and target.dtype != torch.float32:
        return False
    if len(_norms(layers)) > 2:
        return False
    # torch refuses to normalise a batch of one with its own statistics.
    if batch == 1 and any(layer.from_batch for layer in _norms(layers)):
        return False
    if all(layer.kind != LINEAR for layer in layers):
        return False
    tensors = [p for p in mlp if p is not None]
    for before, layer in zip((None, *layers), layers, strict=False):
        # Only the batch norm kernel applies an activation.
        if layer.kind in (ELU, RELU) and (before is None or before.kind != BATCH_NORM):
            return False
        if layer.kind in (BATCH_NORM, LINEAR):
            # If layers do not fit together, the stages raise the error.
            if layer.weight is None or layer.bias is None or layer.weight.shape[-1] != width:
                return False
            width = layer.weight.shape[0]
        tensors += [
            t for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var) if t is not None
        ]
    return all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _norms(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.kind == BATCH_NORM]


class Spec(NamedTuple):
    """The operator's settings other than tensors and numbers.  The graph holds them as text."""

    options: Options
    terms: tuple[str | int | None, ...]  # `LossTerms` without its numbers; empty for logits alone
    layers: tuple[tuple[str, bool, tuple[str, ...]], ...]  # kind, training, names of its tensors

    @classmethod
    @lru_cache(256)
    def read(cls, text: str) -> "Spec":
        """The inverse of `repr(tuple(spec))`."""
        options, terms, layers = ast.literal_eval(text)
        return cls(Options(*options), terms, layers)

    def stand(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> tuple[ChannelMLP, list[Layer]]:
        """The channel MLP and the layers with these tensors.  A layer has two numbers, eps and alpha."""
        left = iter(tensors)
        mlp = ChannelMLP(*(next(left) if self.options.uses_channel else None for _ in range(4)))
        layers = []
        for (kind, training, names), eps, alpha in zip(self.layers, numbers[::2], numbers[1::2], strict=True):
            found: dict[str, Any] = {name: next(left) for name in names}
            layers.append(Layer(kind, training=training, eps=eps, alpha=alpha, **found))
        return mlp, layers


class _Told(NamedTuple):
    """The arguments of an operator that describe a head."""

    features: Tensor  # (N, C, L) or (N, C, H, W)
    mean: Tensor | None  # (N, C) of A
    tensors: list[Tensor]  # of the channel MLP, then parameters and buffers of one layer after another
    spec: Spec
    text: str  # the spec as text
    numbers: list[float]  # eps and alpha of each layer

    @property
    def detached(self) -> list[Tensor]:
        return [x.detach() for x in self.tensors]


def _told(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    layers: Sequence[Layer],
    terms: tuple[Any, ...],
    whole: Tensor | None,
) -> _Told:
    # Running statistics are updated outside, so in training the operator gets none.
    given = [
        layer._replace(running_mean=None, running_var=None) if layer.training else layer for layer in layers
    ]
    names = [tuple(n for n in _TENSORS if getattr(layer, n) is not None) for layer in given]
    kinds = tuple((layer.kind, layer.training, n) for layer, n in zip(given, names, strict=True))
    numbers = [float(x) for layer in given for x in (layer.eps, layer.alpha)]
    spec = Spec(options, tuple(terms[:6]), kinds)
    tensors = [p for p in mlp if p is not None]
    for layer, name in zip(given, names, strict=True):
        tensors += [getattr(layer, n) for n in name]
    with torch.no_grad():
        x = (features if whole is None else whole).detach()
        mean = x.mean((*range(2, x.dim()),), dtype=torch.float32) if options.uses_channel else None
    return _Told(x, mean, tensors, spec, repr((tuple(options), spec.terms, spec.layers)), numbers)


def _move(layers: Sequence[Layer], statistics: Sequence[Tensor], batch: int) -> None:
    """Update running statistics from those of the batch, (2, C): mean and 1 / deviation."""
    for layer, pair in zip(_norms(layers), statistics, strict=True):
        if layer.moves:
            mean, rstd = pair.unbind(0)
            move(layer, mean, (rstd.square().reciprocal() - layer.eps).clamp_min(0.0), batch)


def _features_grad(
    features: Tensor,
    options: Options,
    factors: Sequence[Tensor | None],
    weights: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """dA in torch operations, from its factors (first, S, dU, dg) and kappa T."""
    first, channel, du, dg = factors
    assert first is not None
    assert channel is not None
    index = torch.empty(0, dtype=torch.int64, device=features.device)
    t = weights if options.uses_spatial else None
    return get_backend("torch").features_grad(features, "avg", first, index, t, du, channel, dg, scale)


def _replayed(
    name: tuple[Any, ...],
    given: Sequence[Tensor],
    numbers: Sequence[float],
    record: Callable[[], Recording],
) -> list[Tensor]:
    """The outputs of the launches for the given tensors.  The first call with such tensors records them."""
    addresses = [*map(Tensor.data_ptr, given)]
    key = (
        *name, given[0].stride(), *recorded.triton_options(),
        *[(*map(of, given),) for of in recorded.PROPERTIES], (*[a & 15 for a in addresses],),
    )  # fmt: skip
    recording = recorded.remembered(key)
    if recording is None:
        if not all(x.is_contiguous() for x in given[1:]):
            raise RuntimeError(
                f"ggam_fast: the {name[0]} step needs contiguous tensors (only features may be strided)"
            )
        recording = record()
        recorded.remember(key, recording)
    out = [blank.make() for blank in recording.outputs]
    addresses += map(Tensor.data_ptr, out)
    recording.forward.play(None, recording.constants(), given, out, addresses, numbers)
    return out


# ---- the fused loss


def fused_loss(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    layers: Sequence[Layer],
    target: Tensor,
    terms: LossTerms,
    whole: Tensor | None = None,
) -> FusedLoss:
    """`step.fused_loss` of known layers.  `whole` is A as (N, C, H, W) if it is channels-last, else None.

    Inductor would copy a channels-last A to flatten it, and copy it back for the operator.
    """
    told = _told(features, mlp, options, layers, terms, whole)
    x, mean, _, spec, text, numbers = told
    with torch.no_grad():
        loss, seen, kept = guided_step(
            x, mean, target.contiguous(), told.detached, text, numbers, float(terms.guidance_weight),
            float(terms.label_smoothing), float(terms.cam_temperature), float(terms.position_temperature),
            float(terms.position_weight),
        )  # fmt: skip
        logits, s, beta, guidance, *maps = _parts(seen, _seen_shapes(features, options, layers))
        positions = [maps.pop(0).view(())] if options.guides_positions else []
        t = maps[0] if maps else _no_map(features)
        sizes = [size for shape in _shapes(features, options, mlp, layers) for size in shape]
        *_, statistics = _split(kept, sizes, spec)
        _move(layers, statistics, x.shape[0])
    parameters = [p for layer in reversed(layers) for p in (layer.weight, layer.bias) if p is not None]
    parameters += [p for p in mlp if p is not None]
    if any(p.requires_grad for p in (features, *parameters)):  # Dynamo refuses a node without gradients
        loss = CompiledNode.apply(
            loss, features, kept, mean, t, text, (tuple(options), *spec[1:]), sizes, *parameters
        )
    return FusedLoss(loss, output_of([logits, s, t, beta, guidance.view(()), *positions]))


class CompiledNode(Function):
    """The loss as a node.  Its backward makes dA by torch operations, all other gradients by one operator."""

    @staticmethod
    def forward(
        loss: Tensor,
        features: Tensor,
        kept: Tensor,
        mean: Tensor | None,
        spatial: Tensor,
        text: str,
        spec: tuple[Any, ...],
        sizes: list[int],
        *parameters: Tensor,
    ) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:5])
        ctx.text, ctx.spec, ctx.sizes = inputs[5:8]
        ctx.shapes = [p.shape for p in inputs[8:]]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        features, kept, mean, spatial = ctx.saved_tensors
        # If strides are first read inside the context, Dynamo (torch 2.15) leaves the caller's autocast off.
        _ = features.stride()
        spec, da = Spec(Options(*ctx.spec[0]), *ctx.spec[1:]), None
        with full_precision(features):
            if ctx.needs_input_grad[1]:
                factors, weights, *_ = _split(kept, ctx.sizes, spec)
                weights = spatial if weights is None else weights
                da = _features_grad(features, spec.options, factors, weights, grad)
        flat = guided_step_grads(kept, mean, grad, ctx.sizes, ctx.text)
        begins = _grad_begins(ctx.sizes, spec)
        found = [flat.narrow(0, at, s.numel()).view(s) for at, s in zip(begins, ctx.shapes, strict=False)]
        return None, da, *[None] * 6, *found


def _no_map(features: Tensor) -> Tensor:
    """T without spatial attention: all ones."""
    return features.new_ones((features.shape[0], features.shape[2]), dtype=torch.float32)


def _scaled(options: Options) -> bool:
    """Whether kappa T differs from T."""
    return options.uses_spatial and options.attention_scale != "printed" and options.spatial_norm != "sigmoid"


def _shapes(
    features: Tensor, options: Options, mlp: ChannelMLP, layers: Sequence[Layer]
) -> Iterator[tuple[int, int]]:
    """The shapes of the tensors that are kept for the backward, in order."""
    batch, channels, positions = features.shape
    if _scaled(options):
        yield batch, positions
    yield from ((batch, channels), (batch, channels))
    if options.uses_spatial:
        yield batch, positions
    if options.uses_channel:
        yield batch, channels
    for layer in reversed(layers):
        if layer.kind == LINEAR:
            assert layer.weight is not None
            j, c = layer.weight.shape
            yield from ((batch, j), (batch, c))
        elif layer.kind == BATCH_NORM:
            assert layer.weight is not None
            yield 2, layer.weight.shape[0]
    if options.uses_channel:
        assert mlp.fc1_weight is not None
        hidden = mlp.fc1_weight.shape[0]
        yield from ((batch, hidden), (batch, channels), (batch, hidden))
    for layer in _norms(layers):
        assert layer.weight is not None
        yield 2, layer.weight.shape[0]


def _padded(size: int) -> int:
    """The number of elements, rounded up to whole blocks of 16 bytes."""
    return (size + 3) // 4 * 4


def _parts(whole: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Views of these shapes into one tensor.  Each begins at a multiple of 16 bytes."""
    found, at = [], 0
    for rows, columns in shapes:
        found.append(whole.narrow(0, at, rows * columns).view(rows, columns))
        at += _padded(rows * columns)
    return found


def _seen_shapes(features: Tensor, options: Options, layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """The shapes of the logits, S, beta, the losses and, with spatial attention, T."""
    batch, channels, positions = features.shape
    classes = next(x.weight.shape[0] for x in reversed(layers) if x.kind == LINEAR and x.weight is not None)
    maps = [(batch, positions)] if options.uses_spatial else []
    losses = [(1, 1)] * (1 + options.guides_positions)
    return [(batch, classes), (batch, channels), (batch, channels), *losses, *maps]


class _Kept(NamedTuple):
    """The tensors kept for the backward."""

    factors: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # of dA: first, S, dU, dg
    weights: Tensor | None  # (N, L): kappa T, or None if it equals T
    layers: list[
        tuple[Tensor, Tensor | None]
    ]  # dy and x; for fc1 dy alone; for a batch norm its gradients (2, C)
    statistics: list[Tensor]  # (2, C): mean and 1 / deviation


def _split(kept: Tensor, sizes: Sequence[int], spec: Spec) -> _Kept:
    options, parts = spec.options, _parts(kept, list(zip(sizes[::2], sizes[1::2], strict=True)))
    left = iter(parts)
    weights = next(left) if _scaled(options) else None
    first, channel = next(left), next(left)
    factors = (
        first, channel, next(left) if options.uses_spatial else None, next(left) if options.uses_channel
        else None,
    )  # fmt: skip
    layers: list[tuple[Tensor, Tensor | None]] = []
    for kind, *_ in reversed(spec.layers):
        if kind == LINEAR:
            layers.append((next(left), next(left)))
        elif kind == BATCH_NORM:
            layers.append((next(left), None))
    if options.uses_channel:
        layers += [(next(left), None), (next(left), next(left))]
    return _Kept(factors, weights, layers, list(left))


def _fake(
    features: Tensor,
    mean: Tensor | None,
    target: Tensor,
    tensors: Sequence[Tensor],
    spec: str,
    layer_numbers: Sequence[float],
    *numbers: float,
) -> tuple[Tensor, ...]:
    read = Spec.read(spec)
    mlp, layers = read.stand(tensors, layer_numbers)
    features = features.flatten(2)
    kept = sum(_padded(r * c) for r, c in _shapes(features, read.options, mlp, layers))
    seen = sum(_padded(r * c) for r, c in _seen_shapes(features, read.options, layers))
    return tuple(features.new_empty(shape, dtype=torch.float32) for shape in ((), (seen,), (kept,)))


def _run(
    features: Tensor,
    mean: Tensor | None,
    target: Tensor,
    tensors: Sequence[Tensor],
    spec: str,
    layer_numbers: Sequence[float],
    *numbers: float,
) -> tuple[Tensor, ...]:
    given = [features, target, *tensors] if mean is None else [features, target, mean, *tensors]
    return tuple(
        _replayed(
            ("compiled", spec, *layer_numbers), given, numbers,
            lambda: _record(Spec.read(spec), given, mean is not None, layer_numbers),
        )
    )  # fmt: skip


def _step(
    features: Tensor,
    mean: Tensor | None,
    target: Tensor,
    tensors: Sequence[Tensor],
    spec: str,
    layer_numbers: Sequence[float],
    weight: float,
    smoothing: float,
    temperature: float,
    position_temperature: float,
    position_weight: float,
) -> None:
    """The forward of the fused loss for features (N, C, L) or (N, C, H, W) and their mean.

    Returns the loss, one tensor of the head's outputs, and one tensor that the backward needs.
    """


_step.__name__ = "guided_step"
guided_step = define(_step, tuple[Tensor, Tensor, Tensor], _run, _fake)


def _record(spec: Spec, given: list[Tensor], with_mean: bool, layer_numbers: Sequence[float]) -> Recording:
    recorder, numbers = Recorder(), [Number(1.0) for _ in range(5)]
    words: tuple[Any, ...] = spec.terms
    terms = LossTerms(*words, *(numbers[i] for i in (2, 0, 1, 3, 4)))
    with torch.no_grad(), recorder:
        twins = recorder.like_each(given)
        x, target, *rest = twins
        mean = rest.pop(0) if with_mean else None
        mlp, layers = spec.stand(rest, layer_numbers)
        out, guided, held, visited = step.fused_forward(
            get_backend(recorded.BACKEND), x.flatten(2), mlp, spec.options, layers, target, terms, mean
        )
        f = held.factors
        kept = [held.weights] if _scaled(spec.options) else []
        kept += [t for t in (f.first, f.channel, f.grad_map, f.grad_mean) if t is not None]
        for layer in held.layers:
            pair = [layer.left, layer.right] if layer.product else [_joined(layer.left)]
            kept += [t for t in pair if t is not mean]
        kept += _statistics(visited)
        logits, s, _, *rest = values_of(out)
        seen = [logits, s, *rest]
        seen += [out.spatial_attention] if spec.options.uses_spatial else []
        made = [guided.loss, recorder.together(seen), recorder.together(kept)]
        forward = Pass(recorder.take(), twins, numbers, made)
        return Recording(recorder, [forward], given[0].device)


def _statistics(visited: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Mean and 1 / deviation of each batch norm, (2, C)."""
    return [_joined(of_layer[1]) for of_layer in visited if len(of_layer) > 1]


def _joined(x: Tensor) -> Tensor:
    """Both of two vectors that lie side by side in memory, (2, C), given the first one."""
    return x.as_strided((2, x.numel()), (x.numel(), 1))


def _grad_begins(sizes: Sequence[int], spec: Spec) -> list[int]:
    """Where each gradient begins in the one tensor that holds them all, and where the last one ends.

    The order is that of the node's parameters.
    """
    at = 2 * (3 + _scaled(spec.options) + spec.options.uses_spatial + spec.options.uses_channel - 1)
    shapes: list[tuple[int, int]] = []
    for kind, *_ in reversed(spec.layers):
        if kind == LINEAR:
            shapes.append((sizes[at + 1], sizes[at + 3]))
            at += 4
        elif kind == BATCH_NORM:
            shapes.append((sizes[at + 1], 0))
            at += 2
    if spec.options.uses_channel:
        hidden, channels = sizes[at + 1], sizes[at + 3]
        shapes += [(hidden, channels), (channels, hidden)]
    return _begins(shapes)


def _begins(shapes: Sequence[tuple[int, int]], end: int = 0) -> list[int]:
    """Where each layer's weight gradient (J, C) and bias gradient (J,) begin, and where the last one ends.

    The first begins at `end`.  C is 0 for a batch norm, whose two gradients lie side by side.
    """
    found: list[int] = []
    for j, c in shapes:
        found += [end, end + (_padded(j * c) if c else j)]
        end += _padded(j * c) + _padded(j) if c else _padded(2 * j)
    return [*found, end]


def _grads_fake(kept: Tensor, mean: Tensor | None, grad: Tensor, sizes: Sequence[int], spec: str) -> Tensor:
    return kept.new_empty(_grad_begins(sizes, Spec.read(spec))[-1])


def _grads_run(kept: Tensor, mean: Tensor | None, grad: Tensor, sizes: Sequence[int], spec: str) -> Tensor:
    given = [kept, grad] if mean is None else [kept, grad, mean]
    return _replayed(
        ("compiled grads", spec, *sizes), given, (),
        lambda: _record_grads(Spec.read(spec), given, list(sizes)),
    )[0]  # fmt: skip


def _grads(kept: Tensor, mean: Tensor | None, grad: Tensor, sizes: Sequence[int], spec: str) -> None:
    """The gradients of all parameters in one tensor, given the gradient () of the loss."""


_grads.__name__ = "guided_step_grads"
guided_step_grads = define(_grads, Tensor, _grads_run, _grads_fake)


def _record_grads(spec: Spec, given: list[Tensor], sizes: list[int]) -> Recording:
    recorder = Recorder()
    with torch.no_grad(), recorder:
        twins = recorder.like_each(given)
        kept, grad, *rest = twins
        layers = _split(kept, sizes, spec).layers
        mean = iter(rest)
        pairs: list[tuple[Tensor, Tensor]] = []
        norms = [kind == BATCH_NORM for kind, *_ in reversed(spec.layers) if kind in (LINEAR, BATCH_NORM)]
        norms += [False] * (len(layers) - len(norms))
        for (left, right), norm in zip(layers, norms, strict=True):
            if norm:
                dgamma, dbeta = left.unbind(0)
                pairs.append((dgamma, dbeta))
            else:
                pairs.append((left, next(mean) if right is None else right))
        made = held_grads(get_backend(recorded.BACKEND), pairs, [not norm for norm in norms], grad)
        whole = recorder.together(_apart(made, norms))
        return Recording(recorder, [Pass(recorder.take(), twins, [], [whole])], given[0].device)


def _apart(made: Sequence[tuple[Tensor, Tensor]], norms: Sequence[bool]) -> list[Tensor]:
    """The gradients of the layers as contiguous tensors.  The two of a batch norm are one tensor."""
    pieces = [[_joined(pair[0])] if norm else [*pair] for pair, norm in zip(made, norms, strict=True)]
    return [x for piece in pieces for x in piece]


# ---- the drop-in form: logits, and with a target the guidance


def drop_in(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    layers: Sequence[Layer],
    target: Tensor | None,
    terms: LossTerms | None,
    whole: Tensor | None = None,
) -> GGAMOutput:
    """The head's output for known layers.  Without a target only the logits are valid.

    `whole` is the same as in `fused_loss`.
    """
    told = _told(features, mlp, options, layers, () if terms is None else terms, whole)
    x, mean, tensors, spec, text, numbers = told
    trained = any(x.requires_grad for x in tensors)
    graph = torch.is_grad_enabled() and (features.requires_grad or trained)
    temperatures = [1.0, 1.0]
    if terms is not None:
        temperatures = [float(terms.cam_temperature), float(terms.position_temperature)]
    with torch.no_grad():
        labels = None if target is None else target.contiguous()
        seen, kept = drop_in_step(x, mean, labels, told.detached, text, numbers, *temperatures, graph)
        layout = _drop_in_kept(spec, features, mlp, layers, graph)
        _move(layers, _parts(kept, layout)[len(layout) - len(_norms(layers)) :], x.shape[0])
    if graph:
        plain = (tuple(options), *spec[1:])
        seen = DropInNode.apply(seen, features, x, mean, kept, text, plain, numbers, trained, *tensors)
    logits, *attention = _parts(seen, _drop_in_seen(spec, features, layers))
    if target is None:
        return GGAMOutput(logits, *[logits] * 4)
    s, beta, guidance, *maps = attention
    positions = [maps.pop(0).view(())] if options.guides_positions else []
    t = maps[0] if maps else _no_map(features)
    if not options.uses_channel:
        s, guidance = s.detach(), guidance.detach()
    return output_of([logits, s, t, beta.detach(), guidance.view(()), *positions])


class DropInNode(Function):
    """All outputs in one tensor.  The backward is one operator; torch operations then make dA from it."""

    @staticmethod
    def forward(
        seen: Tensor,
        features: Tensor,
        given: Tensor,
        mean: Tensor | None,
        kept: Tensor,
        text: str,
        spec: tuple[Any, ...],
        numbers: list[float],
        trained: bool,
        *tensors: Tensor,
    ) -> Tensor:
        return seen.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5], *inputs[9:])
        ctx.text, ctx.spec, ctx.numbers, ctx.trained = inputs[5:9]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        seen, features, given, mean, kept, *tensors = ctx.saved_tensors
        # If strides are first read inside the context, Dynamo (torch 2.15) leaves the caller's autocast off.
        _ = features.stride()
        spec, da = Spec(Options(*ctx.spec[0]), *ctx.spec[1:]), None
        flat = drop_in_step_grads(
            given.detach(), mean, seen, kept, grad.contiguous(), [x.detach() for x in tensors], ctx.text,
            ctx.numbers, ctx.trained,
        )  # fmt: skip
        mlp, layers = spec.stand(tensors, ctx.numbers)
        if ctx.needs_input_grad[1]:
            with full_precision(features):
                t, s = _attention(spec, features, mlp, layers, seen, kept)
                parts = _parts(flat, _drop_in_factors(spec.options, features))
                du = parts[1] if spec.options.uses_spatial else None
                dg = parts[-1] if spec.options.uses_channel else None
                da = _features_grad(features, spec.options, (parts[0], s, du, dg), t)
        at = _parameters(spec) if ctx.trained else []
        begins = _drop_in_begins(spec, features, mlp, layers)
        found = [
            flat.narrow(0, begins[at.index(i)], x.numel()).view(x.shape) if i in at else None
            for i, x in enumerate(tensors)
        ]
        return None, da, *[None] * 7, *found


def _parameters(spec: Spec) -> list[int]:
    """The indices of the parameters among the tensors, in the order of their gradients."""
    at, found = 4 * spec.options.uses_channel, []
    for *_, names in spec.layers:
        found.append([at, at + 1][: len(names)])
        at += len(names)
    return [i for layer in reversed(found) for i in layer] + [*range(4)][: 4 * spec.options.uses_channel]


def _drop_in_seen(spec: Spec, features: Tensor, layers: Sequence[Layer]) -> list[tuple[int, int]]:
    shapes = _seen_shapes(features, spec.options, layers)
    return shapes if spec.terms else shapes[:1]


def _drop_in_kept(
    spec: Spec, features: Tensor, mlp: ChannelMLP, layers: Sequence[Layer], graph: bool
) -> list[tuple[int, int]]:
    """The shapes of the tensors kept for the backward, in order.

    The norms' statistics come last.  Without a graph they are the only ones.
    """
    (batch, channels, positions), options = features.shape, spec.options
    shapes: list[tuple[int, int]] = []
    if graph:
        shapes += [(batch, positions)] * _scaled(options)
        shapes.append((batch, channels))
        shapes += [(batch, positions)] * (options.uses_spatial and not spec.terms)  # else an output
        shapes += [(1, batch)] * options.uses_spatial
        shapes += [(batch, positions), (1, batch)] * (options.guides_positions and bool(spec.terms))
        if options.uses_channel:
            assert mlp.fc1_weight is not None
            shapes += [(batch, mlp.fc1_weight.shape[0]), *[(batch, channels)] * bool(spec.terms)]
        shapes += [(batch, x.weight.shape[-1]) for x in layers if x.weight is not None]
    return shapes + [(2, x.weight.shape[0]) for x in _norms(layers) if x.weight is not None]


def _drop_in_factors(options: Options, features: Tensor) -> list[tuple[int, int]]:
    """The shapes of dA's first factor, dU and dg."""
    batch, channels, positions = features.shape
    rest = [(batch, positions)] * options.uses_spatial + [(batch, channels)] * options.uses_channel
    return [(batch, channels), *rest]


def _drop_in_begins(spec: Spec, features: Tensor, mlp: ChannelMLP, layers: Sequence[Layer]) -> list[int]:
    """`_begins` of the gradients, which follow the factors of dA in the same tensor."""
    weights = [x.weight for x in reversed(layers)] + [mlp.fc1_weight, mlp.fc2_weight]
    shapes = [(w.shape[0], w.shape[1] if w.dim() == 2 else 0) for w in weights if w is not None]
    return _begins(shapes, sum(_padded(r * c) for r, c in _drop_in_factors(spec.options, features)))


def _attention(
    spec: Spec, features: Tensor, mlp: ChannelMLP, layers: Sequence[Layer], seen: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """kappa T (not to be used without spatial attention) and S."""
    parts = _parts(kept, _drop_in_kept(spec, features, mlp, layers, True))
    if _scaled(spec.options):
        return parts[0], parts[1]
    s, t, *_ = parts
    return _parts(seen, _drop_in_seen(spec, features, layers))[-1] if spec.terms else t, s


def _drop_in_fake(
    features: Tensor,
    mean: Tensor | None,
    target: Tensor | None,
    tensors: Sequence[Tensor],
    spec: str,
    layer_numbers: Sequence[float],
    temperature: float,
    position_temperature: float,
    graph: bool,
) -> tuple[Tensor, Tensor]:
    read = Spec.read(spec)
    mlp, layers = read.stand(tensors, layer_numbers)
    flat = features.flatten(2)
    seen, kept = (
        features.new_empty(sum(_padded(r * c) for r, c in shapes), dtype=torch.float32)
        for shapes in (_drop_in_seen(read, flat, layers), _drop_in_kept(read, flat, mlp, layers, graph))
    )
    return seen, kept


def _drop_in_run(
    features: Tensor,
    mean: Tensor | None,
    target: Tensor | None,
    tensors: Sequence[Tensor],
    spec: str,
    layer_numbers: Sequence[float],
    temperature: float,
    position_temperature: float,
    graph: bool,
) -> tuple[Tensor, Tensor]:
    given = [features, *[x for x in (mean, target) if x is not None], *tensors]

    def record() -> Recording:
        recorder, twice = Recorder(), [Number(temperature), Number(position_temperature)]
        with torch.no_grad(), recorder:
            twins = recorder.like_each(given)
            done = _drop_in_forward(Spec.read(spec), twins, layer_numbers, twice, graph)
            made = [recorder.together(x) for x in (done.seen, done.kept) if x]
            numbers = [] if target is None else twice
            return Recording(recorder, [Pass(recorder.take(), twins, numbers, made)], features.device)

    name = ("compiled drop-in", spec, *layer_numbers, graph)
    numbers = [] if target is None else [temperature, position_temperature]
    seen, *kept = _replayed(name, given, numbers, record)
    return seen, kept[0] if kept else seen.new_empty(0)


def _drop_in(
    features: Tensor,
    mean: Tensor | None,
    target: Tensor | None,
    tensors: Sequence[Tensor],
    spec: str,
    layer_numbers: Sequence[float],
    temperature: float,
    position_temperature: float,
    graph: bool,
) -> None:
    """The forward of the drop-in form for features (N, C, L) or (N, C, H, W) and their mean.

    Returns one tensor of the head's outputs, and one of what the backward needs and the norms' statistics.
    """


_drop_in.__name__ = "drop_in_step"
drop_in_step = define(_drop_in, tuple[Tensor, Tensor], _drop_in_run, _drop_in_fake)


class _Done(NamedTuple):
    """A recorded forward of the drop-in form."""

    seen: list[Tensor]
    kept: list[Tensor]
    features: Tensor  # (N, C, L)
    mlp: ChannelMLP
    for_backward: step.Seen


def _drop_in_forward(
    spec: Spec,
    given: Sequence[Tensor],
    layer_numbers: Sequence[float],
    temperatures: Sequence[float],
    graph: bool,
) -> _Done:
    """`step.drop_in_forward` of `given`: features, mean if used, target if any, the spec's tensors."""
    options, left = spec.options, [*given]
    x = left.pop(0).flatten(2)
    mean = left.pop(0) if options.uses_channel else None
    target = left.pop(0) if spec.terms else None
    words: tuple[Any, ...] = spec.terms
    mlp, layers = spec.stand(left, layer_numbers)
    terms = None
    if words:
        terms = LossTerms(*words, *[temperatures[0], 1.0, 0.0, temperatures[1]])
    out, seen = step.drop_in_forward(
        get_backend(recorded.BACKEND), x, mlp, options, layers, target, terms, mean
    )
    attended, maps, kept = seen.attended, [], []
    assert attended.channel is not None
    if options.uses_spatial:
        maps = [attended.spatial]
    if graph:
        kept = [attended.weights] * _scaled(options)
        kept += [attended.channel] if words else [attended.channel, *maps]
        kept += [attended.total] * options.uses_spatial
        if seen.pull is not None:
            assert seen.pull.share is not None
            kept += [seen.pull.target, seen.pull.share]
        kept += [attended.hidden] * options.uses_channel
        kept += [seen.grad_logits] if options.uses_channel and seen.grad_logits is not None else []
        kept += [of_layer[0] for of_layer in seen.given]
    kept += _statistics(seen.given)
    logits, s, _, *rest = values_of(out)
    outputs = [logits, s, *rest, *maps]
    return _Done(outputs if words else outputs[:1], kept, x, mlp, seen)


def _drop_in_grads_fake(
    features: Tensor,
    mean: Tensor | None,
    seen: Tensor,
    kept: Tensor,
    grad: Tensor,
    tensors: Sequence[Tensor],
    spec: str,
    layer_numbers: Sequence[float],
    trained: bool,
) -> Tensor:
    read = Spec.read(spec)
    mlp, layers = read.stand(tensors, layer_numbers)
    begins = _drop_in_begins(read, features.flatten(2), mlp, layers)
    return kept.new_empty(begins[-1 if trained else 0])


def _drop_in_grads_run(
    features: Tensor,
    mean: Tensor | None,
    seen: Tensor,
    kept: Tensor,
    grad: Tensor,
    tensors: Sequence[Tensor],
    spec: str,
    layer_numbers: Sequence[float],
    trained: bool,
) -> Tensor:
    given = [features, *([] if mean is None else [mean]), seen, kept, grad, *tensors]
    return _replayed(
        ("compiled drop-in grads", spec, *layer_numbers, trained), given, (),
        lambda: _record_drop_in_grads(Spec.read(spec), given, layer_numbers, trained),
    )[0]  # fmt: skip


def _drop_in_grads(
    features: Tensor,
    mean: Tensor | None,
    seen: Tensor,
    kept: Tensor,
    grad: Tensor,
    tensors: Sequence[Tensor],
    spec: str,
    layer_numbers: Sequence[float],
    trained: bool,
) -> None:
    """The factors of dA and, if `trained`, the gradients of all parameters, in one tensor.

    `grad` is the gradient of the forward's first output.
    """


_drop_in_grads.__name__ = "drop_in_step_grads"
drop_in_step_grads = define(_drop_in_grads, Tensor, _drop_in_grads_run, _drop_in_grads_fake)


def _record_drop_in_grads(
    spec: Spec, given: list[Tensor], layer_numbers: Sequence[float], trained: bool
) -> Recording:
    """Record the backward.

    The forward is recorded first, to find where its tensors lie in those given, and then dropped.
    """
    recorder, options, at = Recorder(), spec.options, 1 + spec.options.uses_channel
    with torch.no_grad(), recorder:
        twins = recorder.like_each(given)
        batch = given[0].shape[0]
        target = [torch.empty(batch, dtype=torch.int64)] * bool(spec.terms)
        before = [*twins[:at], *target, *twins[at + 3 :]]
        done = _drop_in_forward(spec, before, layer_numbers, [Number(1.0), Number(1.0)], True)
        passed = _touched(recorder.take())
        twins[at : at + 2] = recorder.together(done.seen), recorder.together(done.kept)
        layers = spec.stand(twins[at + 3 :], layer_numbers)[1]
        logits, *rest = _parts(twins[at + 2], _drop_in_seen(spec, done.features, layers))
        of_s = of_guidance = of_t = of_positions = None
        if spec.terms:
            of_s, _, of_guidance, *maps = rest
            of_positions = maps.pop(0) if options.guides_positions else None
            of_s, of_t = of_s if options.uses_channel else None, maps[0] if maps else None
        held = step.drop_in_factors(
            get_backend(recorded.BACKEND), done.features, done.mlp, options, done.for_backward, logits,
            of_guidance, of_s, of_t, of_positions,
        )  # fmt: skip
        f = held.factors
        made = [x for x in (f.first, f.grad_map, f.grad_mean) if x is not None]
        if trained:
            pairs = held_layer_grads(get_backend(recorded.BACKEND), held)
            made += _apart(pairs, [not layer.product for layer in held.layers])
        whole, notes = recorder.together(made), recorder.take()
        if lost := _touched(notes) & passed - {*map(_storage, twins)} - recorder.parts.keys():
            raise NotRecordable(f"{len(lost)} tensors of the forward that are not kept")
        return Recording(recorder, [Pass(notes, twins, [], [whole])], given[0].device)


def _touched(notes: Sequence[Any]) -> set[int]:
    return {_storage(x) for note in notes for x in note.arguments if isinstance(x, Tensor)}


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
