"""The base of the head and of its eager reference: constructor, parameters, state and timm's interface."""

import functools
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer

from . import checks
from .norm import SettlingBatchNorm1d


class GGAMOutput(NamedTuple):
    """The output of a head for features and a target.

    Maps have the spatial shape of the input: (N, H, W), or (N, L) for `input_fmt="NLC"`, where L
    does not count `prefix_tokens`.
    """

    logits: Tensor
    """(N, K) class scores"""
    channel_attention: Tensor
    """(N, C) S, positive, sums to 1 over channels"""
    spatial_attention: Tensor
    """(N, H, W) T; sums to 1 over positions for "softmax", in (0, 1) for "sigmoid" """
    cam_weights: Tensor
    """(N, C) beta, mean over positions of the class score's gradient, before `cam_norm`"""
    guidance_loss: Tensor
    """() L_GGAM, non-negative for "symmetric"; (N,) for `guidance_reduction="none"` """

    @property
    def position_loss(self) -> Tensor | None:
        """() or (N,) L of positions, not negative; None if the head has no `position_guidance`.

        It is not one of the five values, so `logits, s, t, beta, guidance = out` works for every head.
        """
        return None


_from_fields = GGAMOutput.__new__


@functools.wraps(_from_fields)
def _from_fields_or_one_iterable(cls: Any, *values: Any, **fields: Any) -> GGAMOutput:
    """A tuple is also made of one iterable, as transformers' Trainer rebuilds what a model returns."""
    if len(values) == 1 and not fields and not isinstance(values[0], Tensor):
        values = tuple(values[0])
    return _from_fields(cls, *values, **fields)


GGAMOutput.__new__ = _from_fields_or_one_iterable  # type: ignore[method-assign, assignment]

# torch.export.save writes its name.
torch.utils._pytree._register_namedtuple(GGAMOutput, serialized_type_name="ggam_fast.GGAMOutput")


class PositionOutput(GGAMOutput):
    """The output of a head with `position_guidance`: five values, and the position loss as an attribute."""

    _position_loss: Tensor | None = None
    _make = None  # type: ignore[assignment]  # torch's pytree would take it for a tuple of five

    @property
    def position_loss(self) -> Tensor:
        if self._position_loss is None:
            raise RuntimeError(
                "position_loss is lost, because something made this output again from its five values: "
                "compute the loss where the head returns"
            )
        return self._position_loss

    def _asdict(self) -> dict[str, Any]:
        return dict(zip((*self._fields, "position_loss"), values_of(self), strict=True))

    def _replace(self, **fields: Any) -> GGAMOutput:  # type: ignore[override]
        return output_of((self._asdict() | fields).values())


def output_of(values: Iterable[Tensor]) -> GGAMOutput:
    """The output of five values, or of six with the position loss."""
    logits, s, t, beta, guidance, *rest = values
    if not rest:
        return GGAMOutput(logits, s, t, beta, guidance)
    out = PositionOutput(logits, s, t, beta, guidance)
    out._position_loss = rest[0]
    return out


def values_of(out: GGAMOutput) -> tuple[Tensor, ...]:
    """The inverse of `output_of`."""
    return tuple(out) if out.position_loss is None else (*out, out.position_loss)


torch.utils._pytree.register_pytree_node(
    PositionOutput,
    lambda out: (list(values_of(out)), None),
    lambda values, _: output_of(values),
    serialized_type_name="ggam_fast.PositionOutput",
    flatten_with_keys_fn=lambda out: (
        [(torch.utils._pytree.SequenceKey(i), x) for i, x in enumerate(values_of(out))],
        None,
    ),
)


_OF_THE_LOGITS = ("attention", "spatial_norm", "pool_type")
_OTHERS = (
    "cam_at", "cam_class", "cam_detach", "cam_norm", "cam_temperature", "divergence", "guidance_reduction",
    "position_guidance", "position_temperature", "ignore_index", "prefix_tokens",
)  # fmt: skip
_RAISE = (*_OF_THE_LOGITS, "act_layer")  # the first norm's eps may move with the scale: docs/options.md


class GGAMHeadBase(nn.Module):
    """Constructor, parameters and state of a GGAM head.  `GGAMHead` documents the options."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        attention: checks.Attention = "channel_spatial",
        spatial_norm: checks.SpatialNorm = "softmax",
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        pool_type: checks.PoolType = "avg",
        attention_scale: checks.AttentionScale = "unit_mean",
        hidden_size: int | None = 512,
        classifier: nn.Module | None = None,
        cam_at: checks.CamAt = "features",
        cam_class: checks.CamClass = "label",
        cam_detach: bool = True,
        cam_norm: checks.CamNorm = "sigmoid",
        cam_temperature: float = 1.0,
        divergence: checks.Divergence = "symmetric",
        guidance_reduction: checks.Reduction | None = None,
        position_guidance: checks.PositionGuidance = "none",
        position_temperature: float = 1.0,
        ignore_index: int | None = None,
        drop_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] = SettlingBatchNorm1d,
        norm_eps: float | None = None,
        act_layer: Callable[..., nn.Module] = nn.ELU,
        input_fmt: checks.InputFmt = "NCHW",
        prefix_tokens: int = 0,
        feat_size: int | tuple[int, int] | None = None,
        backend: checks.Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checks.positive_int("in_features", in_features)
        self.num_classes = checks.positive_int("num_classes", num_classes, minimum=0)
        self.attention = checks.one_of("attention", attention, checks.ATTENTION)
        self.spatial_norm = checks.one_of("spatial_norm", spatial_norm, checks.SPATIAL_NORM)
        self.pool_type = checks.one_of("pool_type", pool_type, checks.POOL_TYPE)
        scale = checks.one_of("attention_scale", attention_scale, checks.ATTENTION_SCALE)
        # Saved in the state dict.  Older files lack this entry and load as "printed".
        self.unit_mean: Tensor
        self.register_buffer("unit_mean", torch.tensor(scale == "unit_mean", device=device))
        self._attention_scale = scale
        self.hidden_size = checks.positive_int("hidden_size", hidden_size or 0, minimum=0)
        self.cam_at = checks.one_of("cam_at", cam_at, checks.CAM_AT)
        self.cam_class = checks.one_of("cam_class", cam_class, checks.CAM_CLASS)
        if not isinstance(cam_detach, bool):
            raise TypeError(f"cam_detach must be True or False; got {cam_detach!r}")
        self.cam_detach = cam_detach
        self.cam_norm = checks.one_of("cam_norm", cam_norm, checks.CAM_NORM)
        if cam_norm == "standardized_softmax" and attention in ("spatial", "none"):
            raise ValueError(
                'cam_norm="standardized_softmax" is a target for channel attention; got '
                f'attention={attention!r}: use attention="channel_spatial" or "channel"'
            )
        self.cam_temperature = checks.temperature(cam_temperature)
        self.divergence = checks.one_of("divergence", divergence, checks.DIVERGENCE)
        self.guidance_reduction = checks.reduction("guidance_reduction", guidance_reduction, self.divergence)
        self.position_guidance = checks.position_guidance(position_guidance, attention, spatial_norm)
        self.position_temperature = checks.temperature(position_temperature, "position_temperature")
        self.ignore_index = checks.label("ignore_index", ignore_index)
        if not 0.0 <= checks.number("drop_rate", drop_rate) < 1.0:
            raise ValueError(f"drop_rate must be in [0, 1); got {drop_rate!r}")
        self.input_fmt = checks.one_of("input_fmt", input_fmt, checks.INPUT_FMT)
        self.prefix_tokens = checks.prefix_tokens(prefix_tokens, self.input_fmt)
        self.feat_size = checks.feat_size(feat_size)
        self.backend = checks.one_of("backend", backend, checks.BACKEND)
        for name, layer in (("norm_layer", norm_layer), ("act_layer", act_layer)):
            if not callable(layer):
                raise TypeError(f"{name} must make a layer when called; got {layer!r}")
        self._norm_layer, self._act_layer = norm_layer, act_layer
        self._norm_eps = None if norm_eps is None else checks.epsilon("norm_eps", norm_eps)
        if classifier is not None and not isinstance(classifier, nn.Module):
            raise TypeError(f"classifier must be an nn.Module; got {type(classifier).__name__}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        self.rd_channels = 0
        self._reduction = rd_ratio, rd_channels
        if self.attention in ("channel_spatial", "channel"):
            self._build_channel_mlp(factory)
        self.drop = nn.Dropout(drop_rate)
        self.classifier = self._build_classifier(factory) if classifier is None else classifier
        # In a tuple, because a plain attribute would register the module twice.
        self._built = (self.classifier,) if classifier is None else ()

    if TYPE_CHECKING:

        @overload
        def __call__(self, features: Tensor, target: None = ..., pre_logits: bool = ...) -> Tensor: ...
        @overload
        def __call__(self, features: Tensor, target: Tensor, pre_logits: bool = ...) -> GGAMOutput: ...
        @overload
        def __call__(
            self, features: Tensor, target: Tensor | None, pre_logits: bool = ...
        ) -> Tensor | GGAMOutput: ...
        def __call__(self, *arguments: Any, **keywords: Any) -> Any: ...

    def _build_channel_mlp(self, factory: dict[str, Any]) -> None:
        self.rd_channels = self._reduced_channels(*self._reduction)
        self.fc1 = nn.Linear(self.in_features, self.rd_channels, **factory)
        self.fc2 = nn.Linear(self.rd_channels, self.in_features, **factory)

    def _reduced_channels(self, rd_ratio: float, rd_channels: int | None) -> int:
        if rd_channels is None:
            if not 0.0 < checks.number("rd_ratio", rd_ratio) <= 1.0:
                raise ValueError(f"rd_ratio must be in (0, 1]; got {rd_ratio!r}")
            rd_channels = int(round(self.in_features * rd_ratio, 6))  # 49 * (1 / 49) is below 1
            if rd_channels < 1:
                raise ValueError(
                    f"rd_ratio={rd_ratio:g} leaves no hidden channel of {self.in_features}: "
                    f"it must be at least 1/{self.in_features}, or give rd_channels"
                )
        if not 1 <= checks.positive_int("rd_channels", rd_channels) <= self.in_features:
            raise ValueError(
                f"rd_channels must be between 1 and in_features={self.in_features}; got {rd_channels}"
            )
        return rd_channels

    @property
    def attention_scale(self) -> str:
        """ "unit_mean" or "printed".  Loading a state dict sets it."""
        return self._attention_scale

    @attention_scale.setter
    def attention_scale(self, value: str) -> None:
        self._attention_scale = checks.one_of("attention_scale", value, checks.ATTENTION_SCALE)
        self.unit_mean = torch.tensor(value == "unit_mean", device=self.unit_mean.device)

    def _saved_options(self) -> dict[str, Any]:
        """The options in the state dict."""
        options = {name: getattr(self, name) for name in (*_OF_THE_LOGITS, *_OTHERS)}
        if not self._custom_classifier and isinstance(self.classifier, nn.Sequential):
            options["act_layer"] = type(self.classifier[3]).__name__
            options["norm_eps"] = getattr(self.classifier[0], "eps", None)
        return options

    def get_extra_state(self) -> Tensor:
        """The options as JSON in a uint8 tensor, because safetensors holds tensors alone."""
        text = json.dumps(self._saved_options(), sort_keys=True).encode()
        device = "cpu" if self.unit_mean.is_meta else self.unit_mean.device
        return torch.tensor(list(text), dtype=torch.uint8, device=device)

    def set_extra_state(self, state: Tensor) -> None:
        """Warn if a head of other options saved the weights. A strict `load_state_dict` raises too if its
        logits would differ."""
        differences = self._other_options(state)
        if differences:
            self._warn_of(differences.values())

    def _other_options(self, state: Tensor) -> dict[str, str]:
        """The options that are not the saved ones, and what each is and was."""
        try:
            saved = dict(json.loads(bytes(torch.as_tensor(state).round().to(torch.uint8).tolist())))
        except (RuntimeError, TypeError, ValueError):
            return {"": "the saved options cannot be read"}
        own = self._saved_options()
        differ = (name for name in own if name in saved and saved[name] != own[name])
        return {name: f"{name}={own[name]!r}, saved with {saved[name]!r}" for name in differ}

    def _warn_of(self, differences: Iterable[str]) -> None:
        text = "; ".join(differences)
        warnings.warn(
            f"{type(self).__name__} has other options than its state dict: {text}. Build it with the saved "
            "options for the saved results",
            stacklevel=2,
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name, options = f"{prefix}unit_mean", f"{prefix}_extra_state"
        parts = tuple(f"{prefix}{part}." for part in ("fc1", "fc2", "classifier"))
        own = any(key.startswith(parts) for key in state_dict)
        if name not in state_dict and own:
            state_dict[name] = torch.tensor(False, device=self.unit_mean.device)
        differences = self._other_options(state_dict.pop(options)) if options in state_dict else {}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if options in missing_keys:  # files from before the options were saved
            missing_keys.remove(options)
        if name in state_dict and not state_dict[name].is_meta:
            self._attention_scale = "unit_mean" if bool(state_dict[name]) else "printed"
        # Whether the load is strict is not known here: torch raises for unexpected keys if it is.
        wrong = [differences[name] for name in _RAISE if name in differences]
        if wrong:
            unexpected_keys.append(f"{options} ({'; '.join(wrong)})")
        if differences:
            self._warn_of(differences.values())

    @property
    def pooled_features(self) -> int:
        """Width of the vector the classifier sees: C, or `C * H * W` for `pool_type="flatten"`."""
        if self.pool_type != "flatten":
            return self.in_features
        if self.feat_size is None:
            raise ValueError('pool_type="flatten" needs feat_size=(H, W), the size of the maps')
        return self.in_features * self.feat_size[0] * self.feat_size[1]

    @property
    def num_features(self) -> int:
        """Width of the default classifier's last input, which `pre_logits=True` returns (timm's name).

        For a custom classifier it is the width of the classifier's input.
        """
        if self._custom_classifier or self.pool_type == "":
            return self.pooled_features
        return self.hidden_size or self.pooled_features

    @property
    def _custom_classifier(self) -> bool:
        """Whether the classifier is the user's own, passed to the constructor or assigned later."""
        return self.classifier not in self._built

    def _build_classifier(self, factory: dict[str, Any]) -> nn.Module:
        if self.pool_type == "":
            if self.num_classes == 0:
                return nn.Identity()
            raise ValueError(
                'pool_type="" hands the attended map to your own module: give classifier=, '
                "or num_classes=0 to get the map itself"
            )
        last = self._last_linear(factory)
        if not self.hidden_size:
            return last
        first = {} if self._norm_eps is None else {"eps": self._norm_eps}
        norms = [self._norm_layer(self.pooled_features, **first), self._norm_layer(self.hidden_size)]
        if any(given is not None for given in factory.values()):
            norms = [norm.to(**factory) for norm in norms]
        return nn.Sequential(
            norms[0],
            nn.Linear(self.pooled_features, self.hidden_size, **factory),
            norms[1],
            self._act_layer(),
            last,
        )

    def _last_linear(self, factory: dict[str, Any]) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        width = self.hidden_size or self.pooled_features
        return nn.Linear(width, self.num_classes, **factory)

    def reset(
        self,
        num_classes: int,
        pool_type: checks.PoolType | None = None,
        reset_other: bool = False,
        in_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replace the last layer by one for `num_classes` (0: none), as timm's `reset_classifier` asks.

        A `pool_type` that changes the pooled width rebuilds the whole classifier.  `reset_other=True`
        rebuilds it without the hidden layer.  The default classifier replaces a custom one.  New
        `in_features` rebuild `fc1` and `fc2` as well.  `device` and `dtype` are those of the new layers;
        None keeps those of the layers in place.
        If the default classifier cannot be built, this raises ValueError or TypeError and changes nothing.
        """
        names = "num_classes", "pool_type", "hidden_size", "in_features", "rd_channels"
        before = {name: getattr(self, name) for name in names}
        mlp = {name: layer for name, layer in self._modules.items() if name in ("fc1", "fc2")}
        width = None if self._custom_classifier or self.pool_type == "" else self.pooled_features
        like = next(self.parameters(), torch.empty(0))
        factory: dict[str, Any] = {"device": device or like.device, "dtype": dtype or like.dtype}
        try:
            self.num_classes = checks.positive_int("num_classes", num_classes, minimum=0)
            if pool_type is not None:
                self.pool_type = checks.one_of("pool_type", pool_type, checks.POOL_TYPE)
            if reset_other:
                self.hidden_size = 0
            if in_features is not None and in_features != self.in_features:
                self.in_features = checks.positive_int("in_features", in_features)
                if mlp:
                    self._build_channel_mlp(factory)
            hidden = type(self.classifier) is nn.Sequential and len(self.classifier) == 5
            keeps = hidden and bool(self.hidden_size) and width == self.pooled_features
            keeps = keeps and self.pool_type != ""
            new = self._last_linear(factory) if keeps else self._build_classifier(factory)
        except (TypeError, ValueError):
            vars(self).update(before)
            self._modules.update(mlp)
            raise
        for layer in (new, *(self._modules[name] for name in mlp)):
            assert layer is not None
            layer.train(self.training)
        if keeps:
            assert isinstance(self.classifier, nn.Sequential)
            self.classifier[4] = new
        else:
            self.classifier, self._built = new, (new,)

    def load_release_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load the head of a state dict saved by the authors' script (cars_sp_CAM.py).

        `se_module.fc1/fc2` are 1x1 convolutions there and become linear layers.  `classifier.{0,1,2,4}` is
        copied unchanged.  DataParallel's prefix `module.` is removed.  The second copy `s_se_module.*` and
        the backbone's `features.*` are left out.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape; nothing is loaded then.
        """
        found = {
            ".".join(part for part in key.split(".") if part != "module"): value
            for key, value in state_dict.items()
        }
        source = "se_module." if any(k.startswith("se_module.") for k in found) else "s_se_module."
        own = self.state_dict()
        # The authors' file has neither, so it loads as "printed".
        del own["unit_mean"], own["_extra_state"]
        converted: dict[str, Tensor] = {}
        for key, value in found.items():
            if key.startswith(source):
                name = key.removeprefix(source)
                converted[name] = value.flatten(1) if value.dim() == 4 else value
            elif not key.startswith(("features.", "se_module.", "s_se_module.")):
                converted[key] = value
        problems = [f"missing {key}" for key in own if key not in converted]
        problems += [f"unexpected {key}" for key in converted if key not in own]
        problems += [
            f"{key} is {tuple(converted[key].shape)}, expected {tuple(own[key].shape)}"
            for key in own
            if key in converted and converted[key].shape != own[key].shape
        ]
        if problems:
            raise ValueError(f"state_dict does not fit this head: {'; '.join(problems)}")
        self.load_state_dict(converted)

    def _check_request(self, target: Tensor | None, pre_logits: bool) -> None:
        if target is None:
            return
        if pre_logits:
            raise ValueError("pre_logits=True returns features, not scores: call it without target")
        if self.num_classes == 0:
            raise ValueError("target was given, but num_classes=0: there is no class score to explain")

    def _without_prefix(self, features: Tensor) -> Tensor:
        """Tokens that are positions of the image."""
        if self.prefix_tokens == 0 or not isinstance(features, Tensor) or features.dim() != 3:
            return features
        if features.shape[1] <= self.prefix_tokens:
            raise ValueError(
                f"features must have tokens (N, L, C) beside the prefix_tokens={self.prefix_tokens}; "
                f"got shape {tuple(features.shape)}"
            )
        return features[:, self.prefix_tokens :]

    def _leaf(self, features: Proxy, *rest: Any) -> Any:
        """The whole head as one node of the graph that `torch.fx` traces, as torch's own layers are."""
        tracer = features.tracer
        name = tracer.path_of_module(self) if isinstance(tracer, Tracer) else ""
        if not name:
            raise TypeError(
                f"{type(self).__name__} is a leaf of torch.fx and has no operations to trace: trace a module "
                "that holds it"
            )
        return tracer.create_proxy("call_module", name, (features, *rest), {})

    def _check_positions(self, spatial_shape: tuple[int, ...]) -> None:
        if self.pool_type != "flatten" or self.feat_size is None:
            return
        height, width = self.feat_size
        expected = (height, width) if len(spatial_shape) == 2 else (height * width,)
        if spatial_shape != expected:
            raise ValueError(
                f'features must have the size feat_size={expected} for pool_type="flatten"; '
                f"got {spatial_shape}"
            )

    def extra_repr(self) -> str:
        names = ["attention", "spatial_norm", "pool_type", "attention_scale", "cam_at", "cam_class",
                 "cam_detach", "cam_norm", "divergence", "guidance_reduction", "input_fmt", "backend",
                 *["position_guidance"] * (self.position_guidance != "none"),
                 *["prefix_tokens"] * bool(self.prefix_tokens)]  # fmt: skip
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.in_features}, {self.num_classes}, {options}"
