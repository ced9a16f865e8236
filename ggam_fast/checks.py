"""Checks of options, shapes, layouts and types.

Each error is one sentence that names the argument, what came and what is expected.
"""

import os
from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Attention = Literal["channel_spatial", "channel", "spatial", "none"]
SpatialNorm = Literal["softmax", "sum", "sigmoid"]
PoolType = Literal["avg", "max", "flatten", ""]
AttentionScale = Literal["unit_mean", "printed"]
CamAt = Literal["features", "attended"]
CamClass = Literal["label", "predicted"]
CamNorm = Literal["sigmoid", "softmax", "standardized", "standardized_softmax"]
Divergence = Literal["symmetric", "forward", "reverse"]
PositionGuidance = Literal["none", "relu", "standardized_softmax"]
Reduction = Literal["mean", "sum", "none"]
InputFmt = Literal["NCHW", "NHWC", "NLC"]
Backend = Literal["auto", "triton", "torch"]

ATTENTION: tuple[str, ...] = get_args(Attention)
SPATIAL_NORM: tuple[str, ...] = get_args(SpatialNorm)
POOL_TYPE: tuple[str, ...] = get_args(PoolType)
ATTENTION_SCALE: tuple[str, ...] = get_args(AttentionScale)
CAM_AT: tuple[str, ...] = get_args(CamAt)
CAM_CLASS: tuple[str, ...] = get_args(CamClass)
CAM_NORM: tuple[str, ...] = get_args(CamNorm)
DIVERGENCE: tuple[str, ...] = get_args(Divergence)
POSITION_GUIDANCE: tuple[str, ...] = get_args(PositionGuidance)
REDUCTION: tuple[str, ...] = get_args(Reduction)
INPUT_FMT: tuple[str, ...] = get_args(InputFmt)
BACKEND: tuple[str, ...] = get_args(Backend)


def one_of(argument: str, value: object, allowed: tuple[str, ...]) -> str:
    """Return `value` if it is one of `allowed`, else raise ValueError."""
    value = getattr(value, "value", value)  # timm's Format is an Enum of these strings
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return value


def positive_int(argument: str, value: object, minimum: int = 1) -> int:
    """Return `value` if it is an int of at least `minimum`, else raise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be an int; got {value!r}")
    if value < minimum:
        raise ValueError(f"{argument} must be at least {minimum}; got {value}")
    return value


def reduction(argument: str, value: str | None, divergence: str) -> str:
    """Return one of `REDUCTION`.  None gives "sum" for divergence="forward", else "mean" (see `guidance`)."""
    if value is None:
        return "sum" if divergence == "forward" else "mean"
    return one_of(argument, value, REDUCTION)


def number(argument: str, value: object) -> float:
    """Return `value` as a float if it is a real number, else raise TypeError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{argument} must be a number; got {value!r}")
    return float(value)


def temperature(value: float, argument: str = "cam_temperature") -> float:
    """Return a finite temperature > 0, else raise."""
    if not 0.0 < number(argument, value) < float("inf"):
        raise ValueError(f"{argument} must be positive and finite; got {value!r}")
    return float(value)


def position_guidance(value: object, attention: str, spatial_norm: str) -> str:
    """Return one of `POSITION_GUIDANCE` that fits the attention, else raise."""
    found = one_of("position_guidance", value, POSITION_GUIDANCE)
    if found != "none" and attention not in ("channel_spatial", "spatial"):
        raise ValueError(
            f"position_guidance={found!r} guides the map of spatial attention; got attention={attention!r}: "
            'use attention="channel_spatial" or "spatial"'
        )
    if found != "none" and spatial_norm != "softmax":
        raise ValueError(
            f"position_guidance={found!r} compares two distributions over positions; got "
            f'spatial_norm={spatial_norm!r}: use spatial_norm="softmax"'
        )
    return found


def label(argument: str, value: int | None) -> int | None:
    """Return an int or None, else raise TypeError."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{argument} must be an int or None; got {value!r}")
    return value


def epsilon(argument: str, value: float) -> float:
    """Return a finite value >= 0, else raise."""
    if not 0.0 <= number(argument, value) < float("inf"):
        raise ValueError(f"{argument} must be finite and not negative; got {value!r}")
    return float(value)


def feat_size(value: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return (H, W) from an int or a pair of ints, all at least 1, else raise."""
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"feat_size must be (H, W); got {value!r}")
    return positive_int("feat_size", pair[0]), positive_int("feat_size", pair[1])


def prefix_tokens(value: int, input_fmt: str) -> int:
    """Return an int of at least 0, and of 0 for maps, else raise."""
    if positive_int("prefix_tokens", value, minimum=0) and input_fmt != "NLC":
        raise ValueError(f'prefix_tokens={value} needs input_fmt="NLC"; got input_fmt={input_fmt!r}')
    return value


class FeatureMap(NamedTuple):
    """Features viewed as (N, C, L), and the spatial shape for the maps that are returned."""

    features: Tensor
    spatial_shape: tuple[int, ...]


_RANK_HINTS = {
    2: ". These are pooled already, and the map before pooling is needed: build a timm model with "
    'num_classes=0, global_pool="", and give a torchvision model to ggam_fast.replace_head',
    3: '. For tokens (N, L, C) give input_fmt="NLC", and prefix_tokens= for class and register tokens',
    4: '. For a map give input_fmt="NCHW" or "NHWC"',
}


def feature_map(features: Tensor, input_fmt: str = "NCHW", in_features: int | None = None) -> FeatureMap:
    """View `features` as (N, C, L) with one dense inner dimension.

    NCHW memory and channels-last memory (NHWC and NLC tensors too) give a view.  Any other layout is copied
    once.
    """
    one_of("input_fmt", input_fmt, INPUT_FMT)
    if not isinstance(features, Tensor):
        raise TypeError(f"features must be a tensor; got {type(features).__name__}")
    if features.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"features must be float32, bfloat16, float16 or float64; got {features.dtype}")
    rank = 3 if input_fmt == "NLC" else 4
    if features.dim() != rank:
        raise ValueError(
            f"features must be ({', '.join(input_fmt)}), {rank}-dimensional; "
            f"got shape {tuple(features.shape)}{_RANK_HINTS.get(features.dim(), '')}"
        )
    if input_fmt == "NCHW":
        spatial_shape = tuple(features.shape[2:])
        x = features.flatten(2)
    else:
        spatial_shape = tuple(features.shape[1:-1])
        x = features.flatten(1, -2).transpose(1, 2)
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"features must have channels and positions; got shape {tuple(features.shape)}")
    if in_features is not None and x.shape[1] != in_features:
        other = {"NCHW": (-1, "NHWC"), "NHWC": (1, "NCHW")}.get(input_fmt)
        fits = other is not None and features.shape[other[0]] == in_features
        hint = f"; if its layout is {other[1]}, give input_fmt={other[1]!r}" if other and fits else ""
        raise ValueError(
            f"features must have {in_features} channels ({input_fmt}); "
            f"got {x.shape[1]} in shape {tuple(features.shape)}{hint}"
        )
    if 1 not in (x.stride(1), x.stride(2)):
        x = x.contiguous()
    return FeatureMap(x, spatial_shape)


def like_input(x: Tensor, spatial_shape: tuple[int, ...], input_fmt: str) -> Tensor:
    """The inverse of `feature_map` for an (N, C, L) tensor."""
    if input_fmt == "NCHW":
        return x.unflatten(2, spatial_shape)
    return x.transpose(1, 2).unflatten(1, spatial_shape)


def _floating(argument: str, value: object, names: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{argument} must be a floating-point tensor {names}; got {got}")


def small(argument: str, value: Tensor, shape: tuple[int, ...], names: str, device: torch.device) -> Tensor:
    """Return the float tensor `value` if it has this shape and device; the error names the shape `names`."""
    _floating(argument, value, names)
    if tuple(value.shape) != shape:
        raise ValueError(f"{argument} must be {names} = {shape}; got {tuple(value.shape)}")
    on_device(argument, value, device)
    return value


def on_device(argument: str, value: Tensor, device: torch.device) -> None:
    """Raise unless the tensor is where the features are."""
    if value.device != device:
        raise ValueError(f"{argument} must be on the device of the features, {device}; got {value.device}")


def matrix(argument: str, value: Tensor, names: str) -> Tensor:
    """Return `value` if it is a float matrix, else raise an error that names the expected shape."""
    _floating(argument, value, names)
    if value.dim() != 2:
        raise ValueError(f"{argument} must be {names}; got shape {tuple(value.shape)}")
    return value


def loss_weights(guidance_weight: float, label_smoothing: float) -> tuple[float, float]:
    """Return both values if they are in range, else raise."""
    if not 0.0 <= number("guidance_weight", guidance_weight) < float("inf"):
        raise ValueError(f"guidance_weight must be finite and not negative; got {guidance_weight!r}")
    if not 0.0 <= number("label_smoothing", label_smoothing) <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing!r}")
    return guidance_weight, label_smoothing


def position_weight(value: float | None, guided: bool | None = None) -> float | None:
    """Return None or a finite value >= 0, else raise; raise too if it is > 0 and T is not guided.

    With `guided` True None gives 1.
    """
    if value is None:
        return 1.0 if guided else None
    if not 0.0 <= number("position_weight", value) < float("inf"):
        raise ValueError(f"position_weight must be finite and not negative; got {value!r}")
    if value and guided is False:
        raise ValueError(
            f"position_weight={value!r} needs a head with position_guidance: "
            'use GGAMHead(..., position_guidance="relu")'
        )
    return value


def class_weights(value: Tensor | None) -> Tensor | None:
    """Return None or a float tensor (K,), else raise."""
    if value is not None:
        _floating("weight", value, "(K,), one number a class")
        if value.dim() != 1:
            raise ValueError(f"weight must be (K,), one number a class; got shape {tuple(value.shape)}")
    return value


def scores(logits: Tensor, batch: int, num_classes: int) -> None:
    """Raise unless a classifier returned one score for every image and class."""
    if tuple(logits.shape) != (batch, num_classes):
        raise ValueError(
            f"classifier must return scores (N, num_classes) = ({batch}, {num_classes}); "
            f"got {tuple(logits.shape)}"
        )


def target(
    value: Tensor,
    batch: int,
    num_classes: int,
    ignore_index: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Check class indices (N,) or class probabilities (N, K) on `device` and return them.

    An index must be in [0, K) or equal `ignore_index`.  On the CPU a wrong index raises ValueError at once.
    On CUDA and in a compiled function an assertion finds it, without a synchronisation.
    `GGAM_FAST_CHECKS=1` raises the ValueError at once on every device.  Under vmap and in tracers indices
    are not checked.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"target must be a tensor; got {type(value).__name__}")
    if device is not None:
        on_device("target", value, device)
    if value.is_floating_point():
        if tuple(value.shape) != (batch, num_classes):
            raise ValueError(
                f"target with class probabilities must be (N, K) = ({batch}, {num_classes}); "
                f"got {tuple(value.shape)}"
            )
        return value
    if tuple(value.shape) == (batch, num_classes):
        raise TypeError(
            f"target must be class indices (N,), or class probabilities (N, K) in a floating-point type; got "
            f"{value.dtype} of shape {tuple(value.shape)}: call .float() on one-hot rows, or .argmax(1)"
        )
    if value.dtype != torch.int64:
        raise TypeError(
            f"target must be int64 class indices (N,) or float class probabilities (N, K); got {value.dtype}"
        )
    if tuple(value.shape) != (batch,):
        raise ValueError(f"target with class indices must be (N,) = ({batch},); got {tuple(value.shape)}")
    expected = f"target must be in [0, {num_classes})" + (
        f" or ignore_index={ignore_index}" if ignore_index is not None else ""
    )
    # Not is_exporting(): it is True whenever Dynamo of torch 2.11 traces.
    if torch.compiler._is_exporting_flag or value.is_meta:
        return value
    if torch.compiler.is_compiling():
        torch._assert_async(_in_range(value, num_classes, ignore_index), expected)
        return value
    at_once = value.device.type == "cpu" or os.environ.get("GGAM_FAST_CHECKS") == "1"
    try:
        in_range = _in_range(value, num_classes, ignore_index)
        if value.device.type == "cuda" and not at_once:
            torch._assert_async(in_range, expected)
        refused = at_once and not in_range
    except RuntimeError:  # under vmap and in a tracer there are no values to check
        return value
    if refused:
        raise ValueError(f"{expected}; got {int(value.min())} to {int(value.max())}")
    return value


def _in_range(value: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    inside = value.clamp(0, num_classes - 1) == value
    return (inside if ignore_index is None else inside | (value == ignore_index)).all()


def backend(value: str, features: Tensor) -> str:
    """Resolve `backend` for these features: "triton" or "torch".

    `GGAM_FAST_BACKEND` overrides "auto".  "auto" is Triton for GPU tensors of a type that the kernels take,
    else torch.
    """
    choice = value if value in BACKEND else one_of("backend", value, BACKEND)
    if choice == "auto":
        choice = os.environ.get("GGAM_FAST_BACKEND", "auto")
        choice = choice if choice in BACKEND else one_of("GGAM_FAST_BACKEND", choice, BACKEND)
    device = features.device.type
    if choice == "auto":
        usable = device in ("cuda", "xpu") and features.dtype != torch.float64 and TRITON_AVAILABLE
        return "triton" if usable else "torch"
    if choice == "triton":
        if not TRITON_AVAILABLE:
            raise RuntimeError('backend="triton" needs the package triton, which is not installed')
        if features.dtype == torch.float64:
            raise TypeError('backend="triton" takes float32, bfloat16 and float16 features; got float64')
        if device == "cpu" and not TRITON_INTERPRETED:
            raise ValueError(
                'backend="triton" needs features on a GPU (or TRITON_INTERPRET=1 in the environment '
                "before ggam_fast is imported); got a CPU tensor"
            )
    return choice


def _triton_available() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None


TRITON_AVAILABLE = _triton_available()
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
