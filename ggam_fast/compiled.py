"""The fused step under `torch.compile`, on the Triton backend: one operator forward, one backward.

`ggam_fast::guided_step` launches all of the forward at once, from a recording as an eager step replays it.
What touches A at its edges stays torch's own: the mean of A, which Inductor computes where A is made, and
the outer products of dA, which it writes where dA is used.  Running statistics move outside of the
operator, from those of the batch.  The backward, `ggam_fast::guided_step_grads`, makes the gradients of all
parameters.
"""

import ast
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import recorded, step
from .autograd import Function
from .backends.layer import BATCH_NORM, DROPOUT, ELU, LINEAR, RELU, Layer
from .backends.registry import full_precision, get_backend
from .backends.triton.launch import plan
from .backends.triton.record import Number, Pass, Recorder, Recording
from .backends.triton.register import define
from .base import GGAMOutput
from .classifier.rules import scores
from .closed_form import ChannelMLP, Options, held_grads
from .norm import move
from .step import FusedLoss, LossTerms

_TENSORS = ("weight", "bias", "running_mean", "running_var")


def applies(
    features: Tensor, mlp: ChannelMLP, options: Options, layers: Sequence[Layer] | None, target: Tensor
) -> bool:
    """Whether the operator takes this head; what it does not take is compiled stage by stage."""
    # Not is_exporting(), which is True in all that Dynamo of torch 2.11 traces.
    if layers is None or options.pool_type != "avg" or torch.compiler._is_exporting_flag:
        return False
    batch, width, positions = features.shape
    if torch.version.hip is not None or batch == 0 or positions == 1 or plan.channels_block(width) is None:
        return False
    if any(layer.kind == DROPOUT and layer.training and layer.p for layer in layers):
        return False
    if len(_norms(layers)) > 2 or (target.is_floating_point() and target.dtype != torch.float32):
        return False
    if all(layer.kind != LINEAR for layer in layers):
        return False
    tensors = [p for p in mlp if p is not None]
    for before, layer in zip((None, *layers), layers, strict=False):
        # An activation has no kernel but that of the batch norm before it.
        if layer.kind in (ELU, RELU) and (before is None or before.kind != BATCH_NORM):
            return False
        if layer.kind in (BATCH_NORM, LINEAR):
            # What does not fit together is refused stage by stage.
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
    """What the operator is told beside tensors and numbers, written as text into the graph."""

    options: Options
    terms: tuple[str | int | None, ...]  # of `LossTerms`, but its numbers
    layers: tuple[tuple[str, bool, tuple[str, ...]], ...]  # kind, training, names of its tensors

    @classmethod
    @lru_cache(256)
    def read(cls, text: str) -> "Spec":
        """The inverse of `repr(tuple(spec))`."""
        options, terms, layers = ast.literal_eval(text)
        return cls(Options(*options), terms, layers)

    def stand(self, tensors: Sequence[Tensor], numbers: Sequence[float]) -> tuple[ChannelMLP, list[Layer]]:
        """The channel MLP and the layers on these tensors; each layer has two numbers, eps and alpha."""
        left = iter(tensors)
        mlp = ChannelMLP(*(next(left) if self.options.uses_channel else None for _ in range(4)))
        layers = []
        for (kind, training, names), eps, alpha in zip(self.layers, numbers[::2], numbers[1::2], strict=True):
            found: dict[str, Any] = {name: next(left) for name in names}
            layers.append(Layer(kind, training=training, eps=eps, alpha=alpha, **found))
        return mlp, layers


def fused_loss(
    features: Tensor,
    mlp: ChannelMLP,
    options: Options,
    layers: Sequence[Layer],
    target: Tensor,
    terms: LossTerms,
    whole: Tensor | None = None,
) -> FusedLoss:
    """`step.fused_loss` of known layers.  `whole` is A as (N, C, H, W), where it is channels-last: to flatten
    it Inductor would write it with its positions together, and then copy it back for the operator."""
    # Statistics of the batch move below; the operator is given none to move.
    given = [
        layer._replace(running_mean=None, running_var=None) if layer.training else layer for layer in layers
    ]
    names = [tuple(n for n in _TENSORS if getattr(layer, n) is not None) for layer in given]
    kinds = tuple((layer.kind, layer.training, n) for layer, n in zip(given, names, strict=True))
    numbers = [float(x) for layer in given for x in (layer.eps, layer.alpha)]
    spec = Spec(options, tuple(terms[:6]), kinds)
    text = repr((tuple(options), spec.terms, spec.layers))
    tensors = [p.detach() for p in mlp if p is not None]
    for layer, name in zip(given, names, strict=True):
        tensors += [getattr(layer, n).detach() for n in name]
    with torch.no_grad():
        x = (features if whole is None else whole).detach()
        mean = x.mean((*range(2, x.dim()),), dtype=torch.float32) if options.uses_channel else None
        loss, seen, kept = guided_step(
            x, mean, target.contiguous(), tensors, text, numbers, float(terms.guidance_weight),
            float(terms.label_smoothing), float(terms.cam_temperature),
        )  # fmt: skip
        logits, s, beta, guidance, *maps = _parts(seen, _seen_shapes(features, options, layers))
        # Without spatial attention T is a constant.
        t = maps[0] if maps else x.new_ones((x.shape[0], features.shape[2]), dtype=torch.float32)
        sizes = [size for shape in _shapes(features, options, mlp, layers) for size in shape]
        *_, statistics = _split(kept, sizes, spec)
        for layer, pair in zip(_norms(layers), statistics, strict=True):
            if layer.moves:
                batch_mean, rstd = pair.unbind(0)
                variance = (rstd.square().reciprocal() - layer.eps).clamp_min(0.0)
                move(layer, batch_mean, variance, x.shape[0])
    parameters = [p for layer in reversed(layers) for p in (layer.weight, layer.bias) if p is not None]
    parameters += [p for p in mlp if p is not None]
    if any(p.requires_grad for p in (features, *parameters)):  # Dynamo refuses a node without
        loss = CompiledNode.apply(
            loss, features, kept, mean, t, text, (tuple(options), *spec[1:]), sizes, *parameters
        )
    return FusedLoss(loss, GGAMOutput(logits, s, t, beta, guidance.view(())))


class CompiledNode(Function):
    """The loss, whose backward writes dA in torch's operations and the parameters' gradients in one
    operator."""

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
        # Strides first read inside the context make dynamo (torch 2.15) leave the caller's autocast off.
        _ = features.stride()
        spec, da = Spec(Options(*ctx.spec[0]), *ctx.spec[1:]), None
        with full_precision(features):
            if ctx.needs_input_grad[1]:
                factors, weights, *_ = _split(kept, ctx.sizes, spec)
                first, channel, du, dg = factors
                t = (spatial if weights is None else weights) if spec.options.uses_spatial else None
                index = torch.empty(0, dtype=torch.int64, device=features.device)
                da = get_backend("torch").features_grad(
                    features, "avg", first, index, t, du, channel, dg, grad
                )
        flat = guided_step_grads(kept, mean, grad, ctx.sizes, ctx.text)
        begins = _grad_begins(ctx.sizes, spec)
        found = [flat.narrow(0, at, s.numel()).view(s) for at, s in zip(begins, ctx.shapes, strict=False)]
        return None, da, *[None] * 6, *found


def _scaled(options: Options) -> bool:
    """Whether kappa T is another tensor than T."""
    return options.uses_spatial and options.attention_scale != "printed" and options.spatial_norm != "sigmoid"


def _shapes(
    features: Tensor, options: Options, mlp: ChannelMLP, layers: Sequence[Layer]
) -> Iterator[tuple[int, int]]:
    """Of what is kept for the backward, in its order."""
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
    """Elements, in whole blocks of 16 bytes."""
    return (size + 3) // 4 * 4


def _parts(whole: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The tensors of these shapes, each at whole blocks of 16 bytes."""
    found, at = [], 0
    for rows, columns in shapes:
        found.append(whole.narrow(0, at, rows * columns).view(rows, columns))
        at += _padded(rows * columns)
    return found


def _seen_shapes(features: Tensor, options: Options, layers: Sequence[Layer]) -> list[tuple[int, int]]:
    """Of logits, S, beta, the guidance loss and, with spatial attention, T."""
    batch, channels, positions = features.shape
    classes = next(x.weight.shape[0] for x in reversed(layers) if x.kind == LINEAR and x.weight is not None)
    maps = [(batch, positions)] if options.uses_spatial else []
    return [(batch, classes), (batch, channels), (batch, channels), (1, 1), *maps]


class _Kept(NamedTuple):
    """What is kept for the backward."""

    factors: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # of dA: first, S, dU, dg
    weights: Tensor | None  # (N, L): kappa T where it is not T
    layers: list[
        tuple[Tensor, Tensor | None]
    ]  # dy and x; of fc1 dy alone; of a batch norm its gradients (2, C)
    statistics: list[Tensor]  # (2, C): mean and one over the deviation


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
    addresses = [*map(Tensor.data_ptr, given)]
    key = (
        "compiled", spec, *layer_numbers, features.stride(), *recorded.triton_options(),
        *[(*map(of, given),) for of in recorded.PROPERTIES], (*[a & 15 for a in addresses],),
    )  # fmt: skip
    recording = recorded.remembered(key)
    if recording is None:
        recording = _record(Spec.read(spec), given, mean is not None, layer_numbers)
        recorded.remember(key, recording)
    out = [blank.make() for blank in recording.outputs]
    addresses += map(Tensor.data_ptr, out)
    recording.forward.play(None, recording.constants(), given, out, addresses, numbers)
    return tuple(out)


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
) -> None:
    """The forward of the fused loss of features (N, C, L) or (N, C, H, W) and their mean: the loss, what a
    head returns in one tensor, and what is kept for the backward in another"""


_step.__name__ = "guided_step"
guided_step = define(_step, tuple[Tensor, Tensor, Tensor], _run, _fake)


def _record(spec: Spec, given: list[Tensor], with_mean: bool, layer_numbers: Sequence[float]) -> Recording:
    if not all(x.is_contiguous() for x in given[1:]):
        raise RuntimeError("ggam_fast::guided_step takes dense tensors beside the features")
    recorder, numbers = Recorder(), [Number(1.0), Number(0.0), Number(1.0)]
    words: tuple[Any, ...] = spec.terms
    terms = LossTerms(*words, *(numbers[i] for i in (2, 0, 1)))
    statistics: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), recorder:
        twins = recorder.like_each(given)
        x, target, *rest = twins
        mean = rest.pop(0) if with_mean else None
        mlp, layers = spec.stand(rest, layer_numbers)
        out, guided, held = step.fused_forward(
            recorded.BACKEND, x.flatten(2), mlp, spec.options,
            lambda pooled: scores(layers, pooled, True, recorded.BACKEND, statistics), target, terms, mean,
        )  # fmt: skip
        f = held.factors
        kept = [held.weights] if _scaled(spec.options) else []
        kept += [t for t in (f.first, f.channel, f.grad_map, f.grad_mean) if t is not None]
        for layer in held.layers:
            pair = [layer.left, layer.right] if layer.product else [_joined(layer.left)]
            kept += [t for t in pair if t is not mean]
        kept += [_joined(pair[0]) for pair in statistics]
        seen = [out.logits, out.channel_attention, out.cam_weights, out.guidance_loss]
        seen += [out.spatial_attention] if spec.options.uses_spatial else []
        made = [guided.loss, recorder.together(seen), recorder.together(kept)]
        forward = Pass(recorder.take(), twins, numbers, made)
        return Recording(recorder, [forward], given[0].device)


def _joined(x: Tensor) -> Tensor:
    """Of two neighbours in memory the first -> both."""
    return x.as_strided((2, x.numel()), (x.numel(), 1))


def _grad_begins(sizes: Sequence[int], spec: Spec) -> list[int]:
    """Where each gradient begins in the one tensor of them, in the order of the node's parameters, and its
    end."""
    at = 2 * (3 + _scaled(spec.options) + spec.options.uses_spatial + spec.options.uses_channel - 1)
    found: list[int] = []
    end = 0
    for kind, *_ in reversed(spec.layers):
        if kind == LINEAR:
            j, c = sizes[at + 1], sizes[at + 3]
            found += [end, end + _padded(j * c)]
            end += _padded(j * c) + _padded(j)
            at += 4
        elif kind == BATCH_NORM:  # its two are neighbours
            width = sizes[at + 1]
            found += [end, end + width]
            end += _padded(2 * width)
            at += 2
    if spec.options.uses_channel:
        hidden, channels = sizes[at + 1], sizes[at + 3]
        for j, c in ((hidden, channels), (channels, hidden)):
            found += [end, end + _padded(j * c)]
            end += _padded(j * c) + _padded(j)
    return [*found, end]


def _grads_fake(kept: Tensor, mean: Tensor | None, grad: Tensor, sizes: Sequence[int], spec: str) -> Tensor:
    return kept.new_empty(_grad_begins(sizes, Spec.read(spec))[-1])


def _grads_run(kept: Tensor, mean: Tensor | None, grad: Tensor, sizes: Sequence[int], spec: str) -> Tensor:
    given = [kept, grad] if mean is None else [kept, grad, mean]
    addresses = [*map(Tensor.data_ptr, given)]
    key = (
        "compiled grads", spec, *sizes, *recorded.triton_options(), kept.get_device(),
        *[(x.dtype, a & 15) for x, a in zip(given, addresses, strict=True)],
    )  # fmt: skip
    recording = recorded.remembered(key)
    if recording is None:
        recording = _record_grads(Spec.read(spec), given, list(sizes))
        recorded.remember(key, recording)
    out = recording.outputs[0].make()
    addresses.append(out.data_ptr())
    recording.forward.play(None, None, given, [out], addresses, ())
    return out


def _grads(kept: Tensor, mean: Tensor | None, grad: Tensor, sizes: Sequence[int], spec: str) -> None:
    """The gradients of all parameters for a gradient () of the loss, in one tensor"""


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
        units = [[_joined(pair[0])] if norm else pair for pair, norm in zip(made, norms, strict=True)]
        whole = recorder.together([x for unit in units for x in unit])
        return Recording(recorder, [Pass(recorder.take(), twins, [], [whole])], given[0].device)
