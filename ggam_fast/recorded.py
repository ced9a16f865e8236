"""Replay of a head's steps: a list of the launches that `step` would make, in one autograd node.

The first call with a key records (`backends.triton.record`), and later calls replay.  The key holds all that
the recorded launches depend on: shapes, strides, types, alignment, device, options, layers and their modes,
and which inputs need a gradient.  Addresses and the numbers that change every step are arguments of a
replay.  A function here returns None if a call cannot be recorded, and the caller then runs the step
unrecorded.
"""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import checks, step
from .autograd import Function, batched
from .backends.registry import get_backend
from .backends.triton import cross_entropy as whole
from .backends.triton.launch import options as triton_options
from .backends.triton.record import NotRecordable, Number, Pass, Recorder, Recording
from .base import GGAMHeadBase, GGAMOutput, output_of, values_of
from .closed_form import ChannelMLP, Options, held_features_grad, held_layer_grads
from .entropy import cross_entropy
from .layer import Layer
from .norm import SettlingBatchNorm1d
from .step import FusedLoss, Inputs, LossTerms

Check = Callable[[Tensor, Tensor | None], Inputs]

BACKEND = "triton"
enabled = True
"""False: every step goes unrecorded."""
_TENSORS = ("weight", "bias", "running_mean", "running_var", "tracked")
_PLAIN = {Tensor, nn.Parameter, nn.Buffer}
_SMALL_TYPES = (torch.float32, torch.int64)
_MOST = 64
_recordings: dict[tuple[Any, ...], Recording | None] = {}
_lock = threading.Lock()
# The numbers of a layer that a recording depends on, by the layer's type.  Other types cannot be recorded.
_NORM = itemgetter("training", "eps", "momentum", "track_running_stats")
_NUMBERS: dict[type, Callable[[dict[str, Any]], tuple[Any, ...]] | None] = {
    nn.Linear: None,
    nn.BatchNorm1d: _NORM,
    SettlingBatchNorm1d: _NORM,
    nn.ELU: itemgetter("alpha", "training"),
    nn.ReLU: None,
    nn.Dropout: itemgetter("p", "training"),
    nn.Identity: None,
}
_OPTIONS = itemgetter(
    "attention", "spatial_norm", "pool_type", "_attention_scale", "cam_at", "cam_class", "cam_norm",
    "divergence", "guidance_reduction", "ignore_index", "input_fmt", "num_classes", "position_guidance",
)  # fmt: skip


class Call(NamedTuple):
    """One call of a head that can be replayed."""

    key: tuple[Any, ...]
    given: list[Tensor]  # features, target if any, parameters, buffers
    addresses: list[int]
    parameters: list[Tensor]
    buffers: int  # the number of buffers at the end of `given`

    @property
    def needs_features(self) -> bool:
        """Whether dA is needed."""
        return self.given[0].requires_grad

    @property
    def needs_parameters(self) -> bool:
        """Whether a parameter's gradient is needed."""
        return any(p.requires_grad for p in self.parameters)


def _structure(head: GGAMHeadBase) -> tuple[list[Any], list[Tensor], list[Tensor]] | None:
    """(the head's part of the key, its parameters, its buffers), or None if it cannot be recorded."""
    own = vars(head)
    modules = own["_modules"]
    if not own["cam_detach"] or own["pool_type"] != "avg":
        return None
    key: list[Any] = [*_OPTIONS(own)]
    parameters: list[Tensor] = []
    buffers: list[Tensor] = []
    body = modules["classifier"]
    layers = [modules["drop"], body]
    if type(body) is nn.Sequential:
        its = vars(body)
        a, b, c, d, _ = _STATE(its)
        if a or b or c or d or "forward" in its:
            return None
        layers[1:] = its["_modules"].values()
    if own["attention"] in ("channel_spatial", "channel"):
        fc1, fc2 = modules.get("fc1"), modules.get("fc2")
        if type(fc1) is not nn.Linear or type(fc2) is not nn.Linear:
            return None
        layers[:0] = fc1, fc2
    for layer in layers:
        its = vars(layer)
        a, b, c, d, weights = _STATE(its)
        kind = type(layer)
        if a or b or c or d or "forward" in its or kind not in _NUMBERS:
            return None
        key.append(kind)
        numbers = _NUMBERS[kind]
        if numbers is not None:
            key += numbers(its)
        # A None among the parameters or buffers makes the call unrecorded.
        if weights:
            parameters += weights.values()
            if numbers is not None:
                found = [*its["_buffers"].values()]
                buffers += found if its["training"] else found[:2]  # eval mode counts no batches
        elif kind is nn.Dropout and its["training"] and its["p"]:
            return None
    return key, parameters, buffers


_STATE = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_parameters"
)


# Properties of a tensor as C functions: `map` over them runs no Python for each tensor.
_address = Tensor.data_ptr
_shape = Tensor.shape.__get__  # type: ignore[attr-defined]
_type = Tensor.dtype.__get__  # type: ignore[attr-defined]
_device = Tensor.get_device
_dense = Tensor.is_contiguous
_alignment = (15).__and__  # of an address, in bytes
PROPERTIES = (_shape, _type, _device, _dense)
_needs_grad = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


def _call(form: str, head: GGAMHeadBase, features: Tensor, target: Tensor | None) -> Call | None:
    if (
        not enabled
        or type(features) not in _PLAIN
        or (features.is_cpu and not checks.TRITON_INTERPRETED)
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or checks.backend(head.backend, features) != BACKEND
    ):
        return None
    found = _structure(head)
    if found is None or (target is not None and type(target) is not Tensor):
        return None
    if target is not None and head.guidance_reduction == "none":
        return None
    structure, parameters, buffers = found
    given = [features, *parameters, *buffers] if target is None else [features, target, *parameters, *buffers]
    if not _PLAIN.issuperset(map(type, given)):
        return None
    addresses = [*map(_address, given)]
    grad_mode = torch.is_grad_enabled()
    key = (
        form, grad_mode, torch.is_inference_mode_enabled(), *triton_options(), *structure, features.stride(),
        *map(_shape, given), *map(_type, given), *map(_device, given), *map(_dense, given),
        *(map(_needs_grad, given) if grad_mode else ()), *map(_alignment, addresses),
    )  # fmt: skip
    return Call(key, given, addresses, parameters, len(buffers))


def _recordable(call: Call) -> bool:
    """Whether launches can take these tensors.  Everything checked here is part of the key."""
    features, *rest = call.given
    return (
        features.numel() > 0
        and features.dtype is not torch.float64
        and torch.version.hip is None
        and all(x.get_device() == features.get_device() for x in rest)
        and all(x.is_contiguous() and x.dtype in _SMALL_TYPES for x in rest)
    )


def _recording(
    call: Call, checked: Callable[[], Any], record: Callable[[Any], Recording]
) -> Recording | None:
    """The recording for the call, made if there is none."""
    try:
        return _recordings[call.key]
    except KeyError:
        inputs = checked()
    made: Recording | None = None
    if _recordable(call):
        with suppress(NotRecordable):
            made = record(inputs)
            made.checked = True
    remember(call.key, made)
    return made


def remembered(key: tuple[Any, ...]) -> Recording | None:
    """The recording for the key, or None."""
    return _recordings.get(key)


def remember(key: tuple[Any, ...], recording: Recording | None) -> None:
    """Keep the recording; it replaces the oldest one if there are too many."""
    with _lock:
        while len(_recordings) >= _MOST:
            _recordings.pop(next(iter(_recordings)))
        _recordings[key] = recording


class Blueprint(NamedTuple):
    """A head with indices into a call's tensors in place of its own."""

    features: tuple[str, int]  # input_fmt, in_features
    options: Options
    mlp: tuple[int, ...]
    layers: list[tuple[Layer, dict[str, int]]]  # a layer without tensors, and the index of each
    target: int | None

    @classmethod
    def read(cls, head: GGAMHeadBase, call: Call, inputs: Inputs) -> "Blueprint":
        """The blueprint of the head at the time of the call."""
        at = {id(x): i for i, x in enumerate(call.given)}
        layers = []
        for layer in inputs.layers or []:
            tensors = {n: getattr(layer, n) for n in _TENSORS}
            where = {n: at[id(x)] for n, x in tensors.items() if id(x) in at}
            layers.append((_with_tensors(layer, {}), where))
        mlp = tuple(at[id(p)] for p in inputs.mlp if p is not None)
        target = None if inputs.target is None else 1
        return cls((head.input_fmt, head.in_features), inputs.options, mlp, layers, target)

    def stand(self, given: list[Tensor]) -> Inputs:
        """The head with these tensors."""
        x, shape = checks.feature_map(given[0], *self.features)
        mlp = ChannelMLP(*[given[i] for i in self.mlp]) if self.mlp else ChannelMLP(None, None, None, None)
        layers = [
            _with_tensors(layer, {n: given[i] for n, i in where.items()}) for layer, where in self.layers
        ]
        target = None if self.target is None else given[self.target]
        return Inputs(x, shape, mlp, self.options, BACKEND, layers, target)

    def like_features(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """x (N, C, L) in the shape of the features."""
        return checks.like_input(x, shape, self.features[0])


def _with_tensors(layer: Layer, tensors: dict[str, Tensor]) -> Layer:
    found: dict[str, Any] = dict.fromkeys(_TENSORS) | tensors
    return layer._replace(**found)


def _play(recording: Recording, call: Call, numbers: Sequence[float]) -> tuple[list[Tensor], Tensor | None]:
    """The outputs, and the memory that is kept for the backward."""
    outputs = [blank.make() for blank in recording.outputs]
    kept = None if recording.kept is None else recording.kept()
    addresses = [*call.addresses, *map(_address, outputs)]
    recording.forward.play(kept, recording.constants(), call.given, outputs, addresses, numbers)
    return outputs, kept


def _play_backward(
    recording: Recording,
    given: list[Tensor],
    kept: Tensor | None,
    saved: Sequence[Tensor],
    parameters: int,
    numbers: Sequence[float] = (),
) -> list[Tensor | None]:
    """dA and the parameters' gradients; None for a gradient that is not needed."""
    assert recording.backward is not None
    # The launches are compiled for dense and aligned gradients.
    given = [x if x.is_contiguous() and x.data_ptr() % 16 == 0 else _copied(x) for x in given]
    # Hooks on saved tensors may have packed features into other strides.
    saved = [x if x.stride() == s else _strided(x, s) for x, s in zip(saved, recording.strides, strict=True)]
    da = None if recording.da is None else recording.da.make()
    begins, grads = recording.gradients.make()
    made = begins if da is None else [da, *begins]
    inputs = [*given, *saved]
    addresses = [*map(_address, inputs), *map(_address, made)]
    recording.backward.play(kept, recording.constants(), inputs, made, addresses, numbers)
    none: list[Tensor | None] = [None] * parameters
    return [da, *(grads or none)]


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _strided(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    return x.new_empty_strided(x.shape, stride).copy_(x)


def _check_labels(recording: Recording, head: GGAMHeadBase, target: Tensor) -> None:
    """Check labels while no compiled kernel does: in the interpreter, and until the kernel is compiled."""
    if recording.checked:  # just now, before it was recorded
        recording.checked = False
    elif not recording.forward.compiled or os.environ.get("GGAM_FAST_CHECKS") == "1":
        checks.target(target, target.shape[0], head.num_classes, head.ignore_index)


def _with_map(out: GGAMOutput, stand: Inputs) -> GGAMOutput:
    logits, s, t, *rest = values_of(out)
    return output_of([logits, s, t.view(t.shape[0], *stand.shape), *rest])


def _in_parameter_order(
    call: Call,
    given: list[Tensor],
    layers: Sequence[tuple[Tensor | None, Tensor | None]],
    pairs: Sequence[tuple[Tensor, Tensor]] | None,
) -> list[Tensor]:
    """The gradients of each layer's weight and bias, in the order of the call's parameters."""
    if pairs is None:
        return []
    found: dict[int, Tensor] = {}
    for layer, pair in zip(layers, pairs, strict=True):
        for p, g in zip(layer, pair, strict=True):
            if p is None:
                continue
            if id(p) in found:
                raise NotRecordable("a parameter that two layers share")
            found[id(p)] = g
    first = len(given) - len(call.parameters) - call.buffers
    every = given[first : first + len(call.parameters)]
    if len(found) < len(every):
        raise NotRecordable("a parameter that no layer knows")
    return [found[id(p)] for p in every]


# ---- the fused loss


def fused(
    head: GGAMHeadBase,
    features: Tensor,
    target: Tensor,
    terms: LossTerms,
    check: Check,
) -> FusedLoss | None:
    """`step.fused_loss` replayed; `check` raises where the call does not fit the head."""
    call = _call("fused", head, features, target)
    if call is None:
        return None
    recording = remembered(call.key) or _recording(
        call, lambda: check(features, target), lambda inputs: _record_fused(head, call, inputs, terms)
    )
    if recording is None:
        return None
    _check_labels(recording, head, target)
    numbers = _numbers(terms)
    seen: list[Tensor] = []
    loss = FusedNode.apply(recording, call, numbers, seen, features, *call.parameters)
    return FusedLoss(loss, output_of(seen))


def _numbers(terms: LossTerms) -> tuple[float, ...]:
    """The numbers that change from replay to replay."""
    return (
        terms.guidance_weight, terms.label_smoothing, terms.cam_temperature, terms.position_temperature,
        terms.position_weight,
    )  # fmt: skip


def _record_fused(head: GGAMHeadBase, call: Call, inputs: Inputs, terms: LossTerms) -> Recording:
    numbers = [Number(n) for n in _numbers(terms)]
    weight, smoothing, temperature, of_positions, position_weight = numbers
    terms = terms._replace(
        guidance_weight=weight, label_smoothing=smoothing, cam_temperature=temperature,
        position_temperature=of_positions, position_weight=position_weight,
    )  # fmt: skip
    blueprint, stages = Blueprint.read(head, call, inputs), get_backend(BACKEND)
    needs_features, needs_parameters = call.needs_features, call.needs_parameters
    recorder = Recorder()
    given, grad = recorder.like_each(call.given), recorder.scalar()
    stand = blueprint.stand(given)
    assert stand.layers is not None
    assert stand.target is not None
    da, pairs = None, None
    with torch.no_grad(), recorder:
        out, guided, held, _ = step.fused_forward(
            stages, stand.x, stand.mlp, stand.options, stand.layers, stand.target, terms,
            classes=head.num_classes,
        )  # fmt: skip
        notes = recorder.take()
        if needs_features:
            da = held_features_grad(stages, stand.x, stand.options, held, grad)
        if needs_parameters:
            pairs = held_layer_grads(stages, held, grad)
        notes_of_backward = recorder.take()
    forward = Pass(notes, given, numbers, [guided.loss, *values_of(_with_map(out, stand))])
    made = _in_parameter_order(call, given, [(x.weight, x.bias) for x in held.layers], pairs)
    da = None if da is None else blueprint.like_features(da, stand.shape)
    backward = Pass(notes_of_backward, [grad], [], [da, *made])
    return Recording(recorder, [forward, backward], call.given[0].device)


class FusedNode(Function):
    """The loss as a node.  Its backward scales the held factors and writes dA and the other gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        recording: Recording,
        call: Call,
        numbers: tuple[float, ...],
        seen: list[Tensor],
        *inputs: Tensor,
    ) -> Tensor:
        outputs, kept = _play(recording, call, numbers)
        every = [*call.given, *outputs]
        ctx.save_for_backward(kept, *(every[i] for i in recording.saved))
        ctx.recording, ctx.parameters = recording, len(inputs) - 1
        loss, *out = outputs
        seen += out
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_ggam_loss can be differentiated once; create_graph=True and torch.func.grad need more "
                "derivatives: use GGAMLoss()(head(features, target), target)"
            )
        kept, *saved = ctx.saved_tensors
        scale = grad
        if batched(grad):
            scale = torch.ones((), device=grad.device)
        found = _play_backward(ctx.recording, [scale], kept, saved, ctx.parameters)
        if scale is not grad:
            found = [None if x is None else x * grad.to(x.dtype) for x in found]
        return None, None, None, None, *found


# ---- the drop-in form: logits, and with a target the guidance


def logits(head: GGAMHeadBase, features: Tensor, check: Check) -> Tensor | None:
    """`head(features)` replayed."""
    call = _call("logits", head, features, None)
    if call is None:
        return None
    recording = remembered(call.key) or _recording(
        call, lambda: check(features, None), lambda inputs: _record_drop_in(head, call, inputs)
    )
    if recording is None:
        return None
    if recording.backward is None:
        return _play(recording, call, ())[0][0]
    return DropInNode.apply(recording, call, (), features, *call.parameters)[0]


def guided(head: GGAMHeadBase, features: Tensor, target: Tensor, check: Check) -> GGAMOutput | None:
    """`head(features, target)` replayed."""
    call = _call("guided", head, features, target)
    if call is None:
        return None
    recording = remembered(call.key) or _recording(
        call,
        lambda: check(features, target),
        lambda inputs: _record_drop_in(head, call, inputs),
    )
    if recording is None:
        return None
    _check_labels(recording, head, target)
    numbers = (head.cam_temperature, head.position_temperature)
    if recording.backward is None:
        return output_of(_play(recording, call, numbers)[0])
    return output_of(DropInNode.apply(recording, call, numbers, features, *call.parameters))


def _record_drop_in(head: GGAMHeadBase, call: Call, inputs: Inputs) -> Recording:
    blueprint, stages, terms = Blueprint.read(head, call, inputs), get_backend(BACKEND), inputs.terms
    numbers, varied = [], terms
    if terms is not None:
        numbers = [Number(terms.cam_temperature), Number(terms.position_temperature)]
        varied = terms._replace(cam_temperature=numbers[0], position_temperature=numbers[1])
    needs_features, needs_parameters = call.needs_features, call.needs_parameters
    needs_graph = torch.is_grad_enabled() and (needs_features or needs_parameters)
    channel, spatial = inputs.options.uses_channel, inputs.options.uses_spatial
    recorder = Recorder()
    given = recorder.like_each(call.given)
    stand = blueprint.stand(given)
    x, shape, mlp, options, _, layers, target, _ = stand
    assert layers is not None
    with torch.no_grad(), recorder:
        out, seen = step.drop_in_forward(
            stages, x, mlp, options, layers, target, varied, classes=head.num_classes
        )
        notes = [recorder.take()]
        if needs_graph:
            losses = 0 if terms is None else len(values_of(out)) - 4
            grads = [recorder.like(out.logits), *(recorder.scalar() for _ in range(losses))]
            of_guidance, of_positions = (*grads[1:], None, None)[:2]
            held = step.drop_in_factors(
                stages, x, mlp, options, seen, grads[0], of_guidance, grad_positions=of_positions
            )
            da = held_features_grad(stages, x, options, held) if needs_features else None
            pairs = held_layer_grads(stages, held) if needs_parameters else None
            notes.append(recorder.take())
    outputs = [out.logits] if terms is None else [*values_of(_with_map(out, stand))]
    passes = [Pass(notes[0], given, numbers, outputs)]
    if needs_graph:
        made = _in_parameter_order(call, given, [(x.weight, x.bias) for x in held.layers], pairs)
        da = None if da is None else blueprint.like_features(da, shape)
        passes.append(Pass(notes[1], grads, [], [da, *made]))
    recording = Recording(recorder, passes, call.given[0].device)
    recording.again = partial(_again, blueprint, terms)
    if terms is not None:  # beta; also S, the guidance and T if they are constant
        recording.constant = [3, *[1, 4] * (not channel), *[2] * (not spatial)]
    return recording


class DropInNode(Function):
    """The values of the output, or (logits,); beta carries no gradient."""

    @staticmethod
    def forward(
        ctx: Any, recording: Recording, call: Call, numbers: tuple[float, ...], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, kept = _play(recording, call, numbers)
        every = [*call.given, *outputs]
        needed = [every[i] for i in recording.saved]
        # The last tensors are read by a second differentiation only.
        ctx.save_for_backward(kept, *needed, *call.given[: len(call.given) - call.buffers])
        ctx.recording, ctx.numbers, ctx.buffers = (
            recording,
            numbers,
            call.given[len(call.given) - call.buffers :],
        )
        ctx.needed, ctx.parameters = len(needed), len(inputs) - 1
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(outputs[i] for i in recording.constant))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        recording: Recording = ctx.recording
        kept, *saved = ctx.saved_tensors
        of_attention = len(grads) > 1 and (grads[1] is not None or grads[2] is not None)
        if torch.is_grad_enabled() or of_attention or any(map(batched, grads)):
            given = [*saved[ctx.needed :], *ctx.buffers]
            return None, None, None, *recording.again(given, ctx.parameters, ctx.numbers, grads)
        wanted, blanks = [grads[0], *grads[4:]], [recording.outputs[0], *recording.outputs[4:]]
        given = [
            torch.zeros(blank.shape, device=recording.device) if g is None else g
            for g, blank in zip(wanted, blanks, strict=True)
        ]
        found = _play_backward(recording, given, kept, saved[: ctx.needed], ctx.parameters)
        return None, None, None, *found


def _again(
    blueprint: Blueprint,
    terms: LossTerms | None,
    given: list[Tensor],
    parameters: int,
    numbers: tuple[float, ...],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The backward of the drop-in form by autograd, for second derivatives and for gradients of S or T.

    It runs the forward again but does not update running statistics.
    """
    first = 1 if terms is None else 2
    inputs = [given[0], *given[first : first + parameters]]
    with torch.enable_grad():
        twins = [x.view_as(x) for x in inputs]
        stand = blueprint.stand([twins[0], *given[1:first], *twins[1:], *given[first + parameters :]])
    grads = [*grads]
    if terms is not None:
        terms = terms._replace(cam_temperature=numbers[0], position_temperature=numbers[1])
        grads[2] = None if grads[2] is None else grads[2].flatten(1)
    return step.drop_in_again(stand._replace(terms=terms), grads, twins)


# ---- GGAMLoss


def loss(
    logits: Tensor,
    guidance: Tensor | None,
    target: Tensor,
    weight: float,
    smoothing: float,
    ignore_index: int | None,
) -> Tensor | None:
    """The mean cross entropy plus the weighted `guidance` () if given, replayed."""
    if (
        not enabled
        or type(logits) is not Tensor
        or type(target) is not Tensor
        or target.requires_grad
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or logits.dtype is not torch.float32
        or (guidance is not None and guidance.dim())
        or checks.backend("auto", logits) != BACKEND
    ):
        return None
    given = [logits, target] if guidance is None else [logits, target, guidance]
    addresses = [*map(_address, given)]
    key = (
        "loss", torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *triton_options(), ignore_index,
        *[(*map(of, given),) for of in (*PROPERTIES, _needs_grad)],
        (*[address & 15 for address in addresses],),
    )  # fmt: skip
    call = Call(key, given, addresses, [], 0)

    def valid() -> None:
        checks.target(target, logits.shape[0], logits.shape[1], ignore_index, logits.device)

    recording = _recording(call, valid, lambda _: _record_loss(call, weight, smoothing, ignore_index))
    if recording is None:
        return None
    if recording.checked:
        recording.checked = False
    elif not recording.forward.compiled or os.environ.get("GGAM_FAST_CHECKS") == "1":
        valid()
    if recording.backward is None:
        return _play(recording, call, (smoothing, weight))[0][0]
    return LossNode.apply(recording, call, (smoothing, weight), ignore_index, logits, guidance)


def _record_loss(call: Call, weight: float, smoothing: float, ignore_index: int | None) -> Recording:
    if not call.given[0].is_contiguous():
        raise NotRecordable("logits that are not dense")
    numbers = smoothing, weight, again = Number(smoothing), Number(weight), Number(weight)
    needs_graph = torch.is_grad_enabled() and any(x.requires_grad for x in call.given)
    recorder = Recorder()
    given, scale = recorder.like_each(call.given), recorder.scalar()
    logits, target = given[:2]
    guidance = given[2] if len(given) > 2 else None
    with torch.no_grad(), recorder:
        total, grad = whole.whole_loss(logits, target, guidance, smoothing, weight, ignore_index)
        passes = [Pass(recorder.take(), given, numbers[:2], [total])]
        if needs_graph:
            made = whole.whole_loss_grad(scale, grad, again, guidance is not None)
            outputs = list(made) if guidance is not None else [made[0]]
            passes.append(Pass(recorder.take(), [scale], [again], outputs))
    return Recording(recorder, passes, call.given[0].device)


class LossNode(Function):
    """The whole loss of the drop-in form."""

    @staticmethod
    def forward(
        ctx: Any,
        recording: Recording,
        call: Call,
        numbers: tuple[float, ...],
        ignore_index: int | None,
        *inputs: Tensor | None,
    ) -> Tensor:
        outputs, kept = _play(recording, call, numbers)
        every = [*call.given, *outputs]
        needed = [every[i] for i in recording.saved]
        ctx.save_for_backward(kept, *needed)
        # Not saved tensors, which must not change in place: only a second differentiation reads the logits.
        ctx.again = call.given[0], call.given[0]._version, call.given[1]
        ctx.recording, ctx.numbers, ctx.ignore_index = recording, numbers, ignore_index
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, *saved = ctx.saved_tensors
        smoothing, weight = ctx.numbers
        create_graph = torch.is_grad_enabled()
        if create_graph or batched(grad):
            x, version, target = ctx.again
            if x._version != version:
                raise RuntimeError(
                    "the logits of GGAMLoss must not change in place before it is differentiated twice"
                )
            dlogits = None
            if ctx.needs_input_grad[4]:
                with torch.enable_grad():
                    x = x.view_as(x)
                    entropy = cross_entropy(x, target, smoothing, ctx.ignore_index)
                    (dlogits,) = torch.autograd.grad(entropy, x, grad, create_graph=create_graph)
            return None, None, None, None, dlogits, grad * weight if ctx.needs_input_grad[5] else None
        found = _play_backward(ctx.recording, [grad], kept, saved, 1, (weight,))
        return None, None, None, None, *found
