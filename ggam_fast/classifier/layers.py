"""Known classifiers, read layer by layer: a chain of Linear, BatchNorm1d, ELU, ReLU, Dropout and Identity."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ggam_fast.layer import BATCH_NORM, DROPOUT, ELU, IDENTITY, LINEAR, RELU, Layer
from ggam_fast.norm import SettlingBatchNorm1d


def modules_of(classifier: nn.Module) -> list[nn.Module]:
    """The layers of an nn.Sequential; any other classifier is one layer."""
    # A subclass with nn.Sequential's forward, such as FSDP makes, counts as an nn.Sequential.
    own_forward = type(classifier).forward is not nn.Sequential.forward
    if isinstance(classifier, nn.Sequential) and not own_forward and len(classifier) > 0:
        return list(classifier)  # a layer that occurs twice is listed twice
    return [classifier]


def known_modules(classifier: nn.Module, drop: nn.Dropout) -> list[nn.Module] | None:
    """The layers in order, with dropout before the last one, or None if one is not known."""
    modules = modules_of(classifier)
    modules.insert(-1, drop)
    for m in modules:
        if type(m) not in _READERS or hooked(m) or packed(m):
            return None
    return None if hooked(classifier) else modules


def hooked(module: nn.Module) -> bool:
    """Whether the module has hooks or its own `forward` attribute, which run only if it is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def packed(module: nn.Module) -> bool:
    """Whether the weight is a tensor subclass with rules of its own, such as torchao's quantized ones."""
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is nn.Parameter:
        return False
    return hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "full_tensor")


def read_directly(*layers: nn.Module) -> bool:
    """Whether each layer is its weight and bias and nothing else: x W^T + b."""
    for layer in layers:
        if type(layer).forward is not nn.Linear.forward or hooked(layer):
            return False
        if layer.bias is None or packed(layer):
            return False
    return True


def weight_and_bias(name: str, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The tensors of a layer that `read_directly` allows; an error names it if the weight is sharded."""
    weight = tensor_of(layer, "weight")
    if type(weight) is not nn.Parameter and hasattr(weight, "full_tensor"):
        raise TypeError(
            f"{name} must have a whole weight, because the head reads it directly; got a sharded "
            f"{type(weight).__name__}: shard the head or a module around it"
        )
    return weight, tensor_of(layer, "bias")


def known_layers(classifier: nn.Module, drop: nn.Dropout) -> list[Layer] | None:
    """The layers of `known_modules`, or None."""
    modules = known_modules(classifier, drop)
    return None if modules is None else [read(m) for m in modules]


def read(module: nn.Module) -> Layer:
    """The module's present tensors, numbers and mode."""
    return _READERS[type(module)](module)


def tensor_of(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)`, without `nn.Module.__getattr__` for a parameter."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found  # FSDP keeps its views as plain attributes


def _linear(m: nn.Linear) -> Layer:
    return Layer(LINEAR, tensor_of(m, "weight"), tensor_of(m, "bias"))


def _batch_norm(m: nn.BatchNorm1d) -> Layer:
    weight, bias, buffers = tensor_of(m, "weight"), tensor_of(m, "bias"), m._buffers
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if m.training and not m.track_running_stats:
        mean = var = None
    return Layer(
        BATCH_NORM, weight, bias, mean, var, buffers.get("num_batches_tracked"), m.training, m.eps,
        m.momentum, type(m) is SettlingBatchNorm1d,
    )  # fmt: skip


_READERS: dict[type, Callable[[Any], Layer]] = {
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    SettlingBatchNorm1d: _batch_norm,
    nn.ELU: lambda m: Layer(ELU, alpha=m.alpha),
    nn.ReLU: lambda m: Layer(RELU),
    nn.Dropout: lambda m: Layer(DROPOUT, training=m.training, p=m.p),
    nn.Identity: lambda m: Layer(IDENTITY),
}
