"""Put the head on a model: one of timm's, one of torchvision's, or your own.

A model keeps its class, its parameters' names and its methods. Its class gets one of two mixins in front,
which say where the features come from and give them to the head.
"""

import difflib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import checks
from .base import GGAMOutput
from .head import GGAMHead

_log = logging.getLogger(__name__)

CLASSIFIERS = ("fc", "classifier", "head", "heads")
_POOLING = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Identity, nn.Flatten)
_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    torch.jit.ScriptModule,
    torch.fx.GraphModule,
)


def create_model(name: str, num_classes: int, pretrained: bool = False, **options: Any) -> nn.Module:
    """A timm model with a GGAM head: `timm.create_model`, then `replace_head`.

    Args:
        name: of a timm model that ends in a feature map or in patch tokens.
        num_classes: K; 0 for a head without a classifier.
        pretrained: True fetches timm's weights of all layers but the head.
        options: those of `GGAMHead` (`drop_rate`, `norm_layer` and `act_layer` are the head's), and
            `feature_layer` and `input_size` of `replace_head`. All others, such as `img_size` and
            `drop_path_rate`, go to `timm.create_model`.

    Returns:
        The model. `model(images)` gives logits (N, K), and `model(images, target)` a `GGAMOutput`.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no model of that name, or the model cannot take the head, as `replace_head` says.

    Examples:
        >>> model = ggam_fast.create_model("resnet18", 10, cam_norm="standardized")
        >>> out = model(torch.randn(2, 3, 64, 64), torch.tensor([3, 7]))
        >>> out.logits.shape
        torch.Size([2, 10])
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("create_model needs timm: pip install timm") from error
    checks.positive_int("num_classes", num_classes, minimum=0)
    if not isinstance(name, str) or not (timm.is_model(name) or ":" in name or "/" in name):
        near = difflib.get_close_matches(str(name), timm.list_models(), n=3)
        hint = f"; the nearest names: {', '.join(near)}" if near else ""
        raise ValueError(f"name must be a model of timm; got {name!r}{hint}")
    own = {*inspect.signature(GGAMHead).parameters, "feature_layer", "input_size"}
    given = {n: options.pop(n) for n in [*options] if n not in own}
    for factory in ("device", "dtype"):
        if options.get(factory) is not None:
            given[factory] = options[factory]
    model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **given)
    if options.get("input_size") is None:
        channels, *sides = _input_size(model, None)
        sides = given.get("img_size") or sides
        sides = [sides] * 2 if isinstance(sides, int) else sides
        options["input_size"] = (given.get("in_chans") or channels, *sides)
    return replace_head(model, num_classes, **options)


def replace_head(
    model: nn.Module,
    num_classes: int,
    *,
    feature_layer: str | None = None,
    input_size: Sequence[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Put a GGAM head in the place of the classifier of `model`, which is changed and returned.

    The head stands where the classifier stood, under its name. Layers that nothing uses any more become
    `nn.Identity`, so that every parameter gets a gradient. The logger `ggam_fast.integrations` says at
    level INFO what was replaced. Nothing is changed if an error is raised.

    The model's class becomes a subclass of it. `forward(images)` gives logits (N, K), and
    `forward(images, target)` a `GGAMOutput`. `forward_features(images)` gives what the head is given.
    `get_classifier()` is the head, and `reset_classifier` resets it. Everything else is
    the model's own: parameter names, `group_matcher`, `no_weight_decay`, `set_grad_checkpointing`,
    `pretrained_cfg`.

    Args:
        model: one of timm's; one of torchvision's; or a module with `forward_features`, or with a layer
            whose output is the last feature map or the tokens.
        num_classes: K; 0 for a head without a classifier.
        feature_layer: the name of that layer, as in `model.named_modules()`. None for the output of
            `forward_features`, and for the layer before torchvision's pooling. Of your own modules it needs
            the name. The model stops there: layers above it do not run. If its forward does more up to there
            than to call its layers one after the other, an exception stops it, for which `torch.export`
            needs `strict=True`.
        input_size: (channels, height, width) of an image, with which the model is traced once without
            computing; None for the model's own, or (3, 224, 224).
        options: those of `GGAMHead`. `in_features`, `input_fmt`, `prefix_tokens`, `feat_size`, `device` and
            `dtype` are read off the model where they are not given.

    Raises:
        TypeError: `model` is no module, or one that hides the model (compiled, scripted, sharded,
            DataParallel).
        ValueError: there is no layer of that name; the features are pooled already, or are no tensor; a
            parameter would be left without a gradient; or an option of the head does not fit.

    Examples:
        >>> model = ggam_fast.replace_head(torchvision.models.resnet18(), 10)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    _check_model(model)
    checks.positive_int("num_classes", num_classes, minimum=0)
    size = _input_size(model, input_size)
    if feature_layer is None and not hasattr(model, "forward_features"):
        feature_layer = _last_map(model, size)
    trace = _trace(model, feature_layer, size)
    options = _read_off(model, trace, options)
    head = GGAMHead(options.pop("in_features"), num_classes, **options)
    name = _place(model, trace)
    removed, moves_norm = _unused(model, trace, name)

    head.train(model.training)
    if moves_norm:
        model.norm, model.fc_norm = model.fc_norm, nn.Identity()
    for path in removed:
        parent, _, leaf = path.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = nn.Identity()
    old = model._modules.get(name)
    setattr(model, name, head)
    if feature_layer is not None and trace.chain is None:
        model.get_submodule(feature_layer).register_forward_hook(_stop)
    model._ggam = Place(name, feature_layer, trace.chain)  # type: ignore[assignment]
    model.__class__ = _guided(type(model), feature_layer is not None)
    _follow(model, head)
    _log.info("%s", _what_was_done(model, old, trace, removed, moves_norm))
    return model


def _what_was_done(
    model: Any, old: nn.Module | None, trace: "Trace", removed: list[str], moves_norm: bool
) -> str:
    place, head = model._ggam, model.get_classifier()
    where = place.feature_layer or "forward_features"
    prefix = f", prefix_tokens={head.prefix_tokens}" if head.prefix_tokens else ""
    was = "new" if old is None else f"was {type(old).__name__}"
    text = (
        f"{model._original.__name__}: {place.head} ({was}) is a GGAMHead of {head.num_classes} classes on "
        f"{where}, {head.input_fmt} {tuple(trace.features.shape[1:])}{prefix}"
    )
    if removed:
        text += f"; removed: {', '.join(removed)}"
    return text + ("; fc_norm, which followed pooling, is now norm" if moves_norm else "")


# What a model becomes


class Place(NamedTuple):
    """Where the head stands, and what leads to its features."""

    head: str
    feature_layer: str | None
    chain: tuple[str, ...] | None
    """children that give the features one after the other; None where the model's forward does it"""


class Guided(nn.Module):
    """In front of a model's class: gives what `forward_features` returns to the head."""

    _ggam: Place
    _original: type[nn.Module]
    forward_features: Callable[[Tensor], Tensor]

    def forward(self, images: Tensor, target: Tensor | None = None) -> Tensor | GGAMOutput:
        """Logits (N, K); with `target` a GGAMOutput."""
        return self.forward_head(self.forward_features(images), target=target)

    def forward_head(
        self, features: Tensor, pre_logits: bool = False, target: Tensor | None = None
    ) -> Tensor | GGAMOutput:
        """What the head makes of features; with `pre_logits` its last layer's input."""
        return self.get_classifier()(features, target, pre_logits)

    def get_classifier(self) -> nn.Module:
        """The GGAM head."""
        head = self._modules[self._ggam.head]
        assert head is not None
        return head

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False, **others: Any
    ) -> None:
        """`GGAMHead.reset`; timm's name."""
        head = self.get_classifier()
        head.reset(num_classes, global_pool, reset_other, **others)  # type: ignore[operator]
        _follow(self, head)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (self._original, isinstance(self, GuidedLayer)), vars(self)


class GuidedLayer(Guided):
    """The same for a model whose features are the output of one of its layers."""

    _to_the_layer: Callable[[Tensor], object]

    def forward_features(self, images: Tensor) -> Tensor:
        """The output of the feature layer; the layers above it do not run."""
        if self._ggam.chain is not None:
            for name in self._ggam.chain:
                images = self.get_submodule(name)(images)
            return images
        try:
            self._to_the_layer(images)
        except FeaturesReached as reached:
            return reached.args[0]
        raise RuntimeError(f"the forward of {type(self).__name__} did not reach {self._ggam.feature_layer}")


class FeaturesReached(Exception):
    """Ends a model's forward at its feature layer."""

    def __str__(self) -> str:
        return "this layer ends in the GGAM head: call the model, or its forward_features"


def _stop(module: nn.Module, arguments: Any, output: Any) -> None:
    raise FeaturesReached(output)


_kinds: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}


def _guided(original: type[nn.Module], by_layer: bool) -> type[nn.Module]:
    """The subclass, one for all models of a class."""
    mixin = GuidedLayer if by_layer else Guided
    # Not timm's forward: it calls the forward_features that is ours.
    whole = getattr(original, "forward_features", original.forward)
    names = {"_original": original, "_to_the_layer": whole}
    made = type(f"Guided{original.__name__}", (mixin, original), names)
    return _kinds.setdefault((original, by_layer), made)


def _empty(original: type[nn.Module], by_layer: bool) -> nn.Module:
    """For pickle and copy, which do not find a class that was made here."""
    kind = _guided(original, by_layer)
    return kind.__new__(kind)


def _follow(model: Any, head: Any) -> None:
    """timm's own notes of the classifier."""
    for name, value in (("num_classes", head.num_classes), ("head_hidden_size", head.num_features)):
        if hasattr(model, name):
            setattr(model, name, value)


# What is read off a model


class Trace(NamedTuple):
    """One pass through a model in fake tensors."""

    features: Tensor
    executed: set[nn.Module]
    unused: list[str]  # parameters that lead to no feature
    chain: tuple[str, ...] | None


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    if isinstance(model, Guided):
        raise ValueError(
            "model has a GGAM head already: model.reset_classifier(num_classes) changes its classes"
        )
    if isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"model must be the module itself; got {type(model).__name__}: replace the head first, and wrap, "
            "compile or trace the result"
        )
    sharded = next((name for name, p in model.named_parameters() if hasattr(p, "full_tensor")), None)
    if sharded is not None:
        raise TypeError(f"model must not be sharded yet; got {sharded} sharded: replace the head, then shard")


def _input_size(model: Any, given: Sequence[int] | None) -> tuple[int, ...]:
    if given is not None:
        if len(given) != 3:
            raise ValueError(f"input_size must be (channels, height, width); got {given!r}")
        return tuple(checks.positive_int("input_size", n) for n in given)
    configured = getattr(model, "pretrained_cfg", None) or {}
    size = tuple(configured.get("input_size", (3, 224, 224)))
    # timm's, torchvision's and transformers' ViTs know the size they were built for.
    parts = ((getattr(model, "patch_embed", None), "img_size"), (model, "image_size"),
             (getattr(model, "config", None), "image_size"))  # fmt: skip
    built = next((s for s in (getattr(part, name, None) for part, name in parts) if s is not None), None)
    if isinstance(built, int):
        built = (built, built)
    if isinstance(built, (tuple, list)) and len(built) == 2:
        size = (size[0], *built)
    first = configured.get("first_conv")
    if isinstance(first, str) and first in dict(model.named_modules()):
        channels = getattr(model.get_submodule(first), "in_channels", None)
        # timm keeps the 3 of the weights' images for in_chans=1; a stem of folded pixels has many more.
        if isinstance(channels, int) and channels < 16:
            size = (channels, *size[1:])
    return size


class _Run(nn.Module):
    """`run(model, images)` as a module, for functional_call."""

    def __init__(self, model: nn.Module, run: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, images: Tensor) -> Any:
        return self.run(self.model, images)


def _fake_run(
    model: nn.Module, run: Callable[[nn.Module, Tensor], Any], size: tuple[int, ...], training: bool
) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """What `run` returns, the fake images and the fake parameters. The model stays as it is."""
    from torch._subclasses import FakeTensorMode  # takes as long to import as this library

    modes = {module: module.training for module in model.modules()}
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    wrapped = _Run(model, run)
    try:
        for module in modes:
            module.training = training
        with fake, torch.enable_grad():
            images = torch.empty(2, *size, device=like.device, dtype=like.dtype)
            tensors = {name: fake.from_tensor(x.detach()) for name, x in wrapped.named_buffers()}
            parameters = {name: fake.from_tensor(p.detach()) for name, p in wrapped.named_parameters()}
            for p in parameters.values():
                p.requires_grad_(p.is_floating_point())
            out = functional_call(wrapped, {**tensors, **parameters}, (images,))
    except Exception as error:
        raise ValueError(
            f"model {type(model).__name__} does not take images {tuple(size)} (channels, height, width): "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}; give "
            "input_size= of its images"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return out, images, {name.removeprefix("model."): p for name, p in parameters.items()}


@contextmanager
def _hooks(
    modules: dict[str, nn.Module], before: Callable[..., None] | None, after: Callable[..., None]
) -> Iterator[None]:
    """`before(name, module, arguments)` and `after(name, module, arguments, output)` around each call."""
    with ExitStack() as stack:
        for name, module in modules.items():
            if before is not None:
                hook = module.register_forward_pre_hook(functools.partial(before, name))
                stack.callback(hook.remove)
            hook = module.register_forward_hook(functools.partial(after, name))
            stack.callback(hook.remove)
        yield


def _trace(model: nn.Module, layer: str | None, size: tuple[int, ...]) -> Trace:
    """Follow the features through the model, in training and in evaluation."""
    if layer is not None:
        named = dict(model.named_modules())
        if not isinstance(layer, str) or layer not in named or not layer:
            near = difflib.get_close_matches(str(layer), named, n=3)
            raise ValueError(
                f"feature_layer must be the name of a layer in model.named_modules(); got {layer!r}"
                + (f"; the nearest: {', '.join(near)}" if near else "")
            )
    train, evaluation = (_pass(model, layer, size, training) for training in (True, False))
    chain = train.chain if train.chain == evaluation.chain else None
    return Trace(train.features, train.executed | evaluation.executed, train.unused, chain)


def _pass(model: nn.Module, layer: str | None, size: tuple[int, ...], training: bool) -> Trace:
    executed: set[nn.Module] = set()
    calls: list[tuple[str, Any, Any]] = []  # children called: name, input, output, each with its version
    found: list[Any] = []

    def version(x: Any) -> Any:
        return (x, x._version) if isinstance(x, Tensor) else None

    inputs: dict[str, Any] = {}

    def before(name: str, module: nn.Module, arguments: Any) -> None:
        executed.add(module)
        if name and "." not in name:
            inputs[name] = version(arguments[0]) if len(arguments) == 1 else None

    def after(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        if name and "." not in name:
            calls.append((name, inputs.pop(name, None), version(output)))
        if layer is not None and name == layer:
            found.append(output)
            raise FeaturesReached(output)

    def run(model: Any, images: Tensor) -> Any:
        if layer is None:
            return model.forward_features(images)
        try:
            model(images)
        except FeaturesReached as reached:
            return reached.args[0]
        raise RuntimeError(f"the forward of {type(model).__name__} never calls feature_layer={layer!r}")

    with _hooks(dict(model.named_modules()), before, after):
        out, images, parameters = _fake_run(model, run, size, training)
    where = (
        f"the output of feature_layer={layer!r}" if layer else f"forward_features of {type(model).__name__}"
    )
    if not isinstance(out, Tensor):
        raise ValueError(f"{where} must be one tensor; got {type(out).__name__}: name another feature_layer=")
    if out.dim() not in (3, 4):
        raise ValueError(
            f"{where} must be a feature map or tokens, of 4 or 3 dimensions; got shape {tuple(out.shape)}: "
            "name a layer before pooling as feature_layer="
        )
    names = [name for name, p in parameters.items() if p.requires_grad]
    gradients = (
        torch.autograd.grad(out.float().sum(), [parameters[name] for name in names], allow_unused=True)
        if out.requires_grad
        else [None] * len(names)
    )
    unused = [name for name, g in zip(names, gradients, strict=True) if g is None]
    return Trace(out, executed, unused, _chain(calls, images, out) if layer else None)


def _chain(calls: list[tuple[str, Any, Any]], images: Tensor, out: Tensor) -> tuple[str, ...] | None:
    """Names of the children, where each took what the one before gave, unchanged."""
    at: tuple[Tensor, int] = images, images._version
    for _, took, gave in calls:
        # An in-place operation between them leaves the tensor and counts its version up.
        if took is None or gave is None or took[0] is not at[0] or took[1] != at[1]:
            return None
        at = gave
    return tuple(name for name, *_ in calls) if calls and at[0] is out else None


def _last_map(model: nn.Module, size: tuple[int, ...]) -> str:
    """The last layer before pooling."""
    found: list[tuple[str, tuple[int, ...]]] = []

    def after(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        spatial = isinstance(output, Tensor) and (
            (output.dim() == 4 and output.shape[2:].numel() > 1)
            or (output.dim() == 3 and output.shape[1] > 1)
        )
        if spatial and name and name.split(".")[0] not in CLASSIFIERS and not isinstance(module, _POOLING):
            found.append((name, tuple(output.shape[1:])))

    with _hooks(dict(model.named_modules()), None, after):
        _fake_run(model, lambda m, x: m(x), size, training=False)
    if not found:
        raise ValueError(
            f"model {type(model).__name__} has no layer that gives a feature map or tokens: name it as "
            "feature_layer="
        )
    name, shape = found[-1]
    if type(model).__module__.split(".")[0] != "torchvision":
        raise ValueError(
            f"model {type(model).__name__} has no forward_features: name the layer of its last feature map "
            f"as feature_layer=; the last that gives one is {name!r}, of shape {shape}"
        )
    return name


def _read_off(model: Any, trace: Trace, options: dict[str, Any]) -> dict[str, Any]:
    """The head's options, with those that follow from the model."""
    features, width = trace.features, getattr(model, "num_features", None)
    options = dict(options)
    if options.get("input_fmt") is None:
        said = getattr(model, "output_fmt", "NCHW")
        said = getattr(said, "value", said)
        last = features.shape[-1] == width != features.shape[1]
        options["input_fmt"] = "NLC" if features.dim() == 3 else "NHWC" if said == "NHWC" or last else "NCHW"
    channels = features.shape[1] if options["input_fmt"] == "NCHW" else features.shape[-1]
    if options.setdefault("in_features", channels) != channels:
        raise ValueError(f"in_features must be the model's {channels}; got {options['in_features']!r}")
    if features.dim() == 3 and options.get("prefix_tokens") is None:
        options["prefix_tokens"] = _prefix_tokens(model)
    if features.dim() == 3 and features.shape[1] <= options["prefix_tokens"]:
        raise ValueError(
            f"model {type(model).__name__} gives {features.shape[1]} tokens, and prefix_tokens="
            f"{options['prefix_tokens']} leaves no patch: name a layer before as feature_layer="
        )
    spatial = features.shape[2:] if options["input_fmt"] == "NCHW" else features.shape[1:-1]
    if options.get("pool_type") == "flatten" and options.get("feat_size") is None:
        options["feat_size"] = (
            tuple(spatial) if len(spatial) == 2 else (1, spatial[0] - options["prefix_tokens"])
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is not None:
        for name, value in (("device", like.device), ("dtype", like.dtype)):
            if options.get(name) is None:
                options[name] = value
    return options


def _prefix_tokens(model: nn.Module) -> int:
    said = getattr(model, "num_prefix_tokens", None)
    if isinstance(said, int):
        return said
    tokens = [
        (name, p) for name, p in model.named_parameters()
        if name.rpartition(".")[2].startswith(("cls_token", "class_token"))
    ]  # fmt: skip
    if len(tokens) > 1:
        names = ", ".join(name for name, _ in tokens)
        raise ValueError(f"model has {names}: say how many tokens lead the patches, as prefix_tokens=")
    return tokens[0][1].shape[-2] if tokens and tokens[0][1].dim() > 1 else len(tokens)


def _place(model: nn.Module, trace: Trace) -> str:
    """The name of the classifier that the head replaces."""
    configured = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if isinstance(configured, (tuple, list)) and configured:
        configured = configured[0]
    free = [name for name, child in model.named_children() if trace.executed.isdisjoint(child.modules())]
    names = [configured.split(".")[0]] if isinstance(configured, str) else []
    names = [name for name in (*names, *CLASSIFIERS) if name in free]
    if names:
        return names[0]
    holding = [name for name in free if any(True for _ in model._modules[name].parameters())]  # type: ignore[union-attr]
    if len(holding) == 1:
        return holding[0]
    return next(name for name in ("head", "ggam_head", "ggam_head_") if not hasattr(model, name))


def _unused(model: nn.Module, trace: Trace, head: str) -> tuple[list[str], bool]:
    """Layers that are not called any more, and whether `fc_norm` becomes `norm`."""
    norm, fc_norm = getattr(model, "norm", None), getattr(model, "fc_norm", None)
    # timm's norm after pooling tokens, for the one before it.
    moves = (
        isinstance(norm, nn.Identity) and norm in trace.executed
        and isinstance(fc_norm, nn.Module) and any(True for _ in fc_norm.parameters())
        and fc_norm not in trace.executed
    )  # fmt: skip
    kept = [head, *(["fc_norm"] if moves else [])]
    unused = [name for name in trace.unused if not any(name.startswith(f"{k}.") for k in kept)]
    removed: list[str] = []
    for path, module in model.named_modules():
        inside = [name for name in unused if name.startswith(f"{path}.")]
        done = any(path == r or path.startswith(f"{r}.") for r in (*kept, *removed))
        if not path or done or not inside:
            continue
        if trace.executed.isdisjoint(module.modules()) and len(inside) == len([*module.parameters()]):
            removed.append(path)
    left = [name for name in unused if not any(name.startswith(f"{path}.") for path in removed)]
    left = [name for name in left if model.get_parameter(name).requires_grad]
    if left:
        listed = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        raise ValueError(
            f"model {type(model).__name__} would keep parameters without a gradient: {listed}. They lead to "
            "another output than the features: name a feature_layer= before them, build the model without "
            "them, or call requires_grad_(False) on them"
        )
    return removed, moves
