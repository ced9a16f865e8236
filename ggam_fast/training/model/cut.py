"""A backbone in two parts: up to the maps that enter one of its modules, and from there on."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from timm.layers import get_notrace_functions
from torch import Tensor, fx, nn

from ggam_fast.training.errors import TrainError, first_line
from ggam_fast.training.model.backbones import Backbone, fingerprint

_INSIDE = "model."  # the timm model in a `Backbone`


class FirstLayers(nn.Module):
    """What a backbone computes before its module `before`.

    `forward` takes images (N, 3, size, size) and returns the tensor that enters the module: (N, C, H, W),
    (N, H, W, C) or (N, L, C), as the module expects it. `map_shape` is its shape without N.
    """

    def __init__(self, backbone: Backbone, layers: nn.Module, before: str) -> None:
        super().__init__()
        self.layers = layers
        self.before = before
        self.name = backbone.name
        self.image_size = backbone.image_size
        self.preprocessing = backbone.preprocessing
        self.map_shape: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        return f"maps that enter {self.before}"

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def fingerprint(self) -> str:
        """SHA-256 of the name `before` and of all weights and statistics."""
        return fingerprint(self.layers, self.kind)


class LastLayers(nn.Module):
    """A backbone from one of its modules on. It maps what enters the module to feature maps (N, C, H, W)."""

    def __init__(self, backbone: Backbone, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self._layout = backbone.layout

    def forward(self, maps: Tensor) -> Tensor:
        return self._layout.maps(self.layers(maps))


def cut(backbone: Backbone, before: str) -> tuple[FirstLayers, LastLayers]:
    """`backbone` in two parts, before its module `before`, such as "blocks.5" or "layer4".

    The parts share the backbone's modules. `LastLayers` of `FirstLayers` equals the backbone. This holds for
    every architecture, because the parts are those of the graph of data that torch.fx records.

    Raises:
        TrainError: there is no such module, or the backbone cannot be cut there.
    """
    training = backbone.training
    backbone.eval()
    try:
        first, last = _checked(backbone, before)
    except _NoCut as error:
        usable = ", ".join(_usable(backbone)) or "none"
        raise TrainError(
            f"--finetune-from {before} cannot be used, because {error}; modules of {backbone.name} that can "
            f"be used: {usable}"
        ) from error
    finally:
        backbone.train(training)
    return first.train(training), last.train(training)


def with_last(backbone: Backbone, last: LastLayers) -> Backbone:
    """A copy of `backbone` with the weights and statistics of `last`, which is a copy of its last layers."""
    whole = copy.deepcopy(backbone)
    unknown = whole.load_state_dict(last.layers.state_dict(), strict=False).unexpected_keys
    assert not unknown, unknown
    return whole


class _NoCut(Exception):
    """Says why a backbone cannot be cut before a module."""


class _Tracer(fx.Tracer):
    """Records what runs around one module. Other modules are one step each, whatever is inside."""

    traced_func_name = "forward_features"

    def __init__(self, module: str, around: nn.Module) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        # torch looks for those functions, which timm names, in the files of the modules that it calls. The
        # model's own file is not among them, because it is not called itself.
        self._autowrap_search.append(sys.modules[type(around).__module__])
        self._module = module

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self._module.startswith(f"{module_qualified_name}.")


def _checked(backbone: Backbone, before: str) -> tuple[FirstLayers, LastLayers]:
    """The two parts, after they have shown that together they are the whole."""
    if not before or before not in dict(backbone.model.named_modules()):
        raise _NoCut("there is no such module")
    first, last = _cut(backbone, before)
    size = backbone.image_size
    device = next(backbone.parameters()).device
    images = torch.linspace(-2, 2, 2 * 3 * size * size, device=device).view(2, 3, size, size)
    with torch.no_grad():
        entering = first.eval()(images)
        found, whole = last.eval()(entering), backbone(images)
    if not whole.allclose(found, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise _NoCut("what follows does not give the same maps by itself")
    first.map_shape = tuple(entering.shape[1:])
    return first, last


def _cut(backbone: Backbone, before: str) -> tuple[FirstLayers, LastLayers]:
    target = _INSIDE + before
    try:
        recorded = _Tracer(target, backbone.model).trace(backbone)
    except Exception as error:  # code that asks for values, which a record of operations does not have
        raise _NoCut(f"torch.fx cannot record the network ({first_line(error)})") from error
    first, last = (fx.GraphModule(backbone, copy.deepcopy(recorded)) for _ in range(2))
    call = _call(first, target)
    if call is None:
        raise _NoCut("it is not run to compute feature maps")
    entering = _entering(call)
    if entering.op == "placeholder":
        raise _NoCut("nothing comes before it, and --finetune trains everything")
    output = next(node for node in first.graph.nodes if node.op == "output")
    output.args = (entering,)
    first = _tidy(backbone, first)

    if not _enter_at(last, target):
        # Sizes may be all that is taken from the images, and images have one size.
        last = fx.GraphModule(backbone, copy.deepcopy(recorded))
        _fix_sizes(last, backbone)
        if not _enter_at(last, target):
            raise _NoCut("data pass it by, as inside a residual block")
    last = _tidy(backbone, last)
    if not any(True for _ in last.parameters()):
        raise _NoCut("it has no weights, and nor does what follows")
    return FirstLayers(backbone, first, before), LastLayers(backbone, last)


def _call(module: fx.GraphModule, target: str) -> fx.Node | None:
    return next(
        (node for node in module.graph.nodes if (node.op, node.target) == ("call_module", target)), None
    )


def _enter_at(last: fx.GraphModule, target: str) -> bool:
    """Let what enters the module `target` be the input. Return whether the images are then not needed."""
    call = _call(last, target)
    assert call is not None
    entering = _entering(call)
    (images,) = (node for node in last.graph.nodes if node.op == "placeholder")
    with last.graph.inserting_before(images):
        entering.replace_all_uses_with(last.graph.placeholder("maps"))
    last.graph.eliminate_dead_code()
    if images.users:
        return False
    last.graph.erase_node(images)
    return True


class _Sizes(fx.Interpreter):
    """Runs a graph and keeps the whole numbers in it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, int):
            self.found[n] = value
        return value


def _fix_sizes(module: fx.GraphModule, backbone: Backbone) -> None:
    """Write the whole numbers in a graph that are the same for one image and for two as constants."""
    side = backbone.image_size
    runs = []
    for count in (1, 2):
        runs.append(_Sizes(module))
        images = torch.zeros(count, 3, side, side, device=next(backbone.parameters()).device)
        with torch.no_grad():
            runs[-1].run(images)
    one, two = (run.found for run in runs)
    fixed = {node: value for node, value in one.items() if two[node] == value}
    for node in module.graph.nodes:
        node.args = fx.map_arg(node.args, lambda other: fixed.get(other, other))
        node.kwargs = fx.map_arg(node.kwargs, lambda other: fixed.get(other, other))


def _entering(call: fx.Node) -> fx.Node:
    """The tensor that enters a module. It may take others that do not depend on the images."""
    given = next(iter((*call.args, *call.kwargs.values())), None)
    if not isinstance(given, fx.Node):
        raise _NoCut("it does not take one tensor")
    return given


def _tidy(backbone: Backbone, part: fx.GraphModule) -> fx.GraphModule:
    """`part` with what its graph uses of the backbone alone."""
    part.graph.eliminate_dead_code()
    part.graph.lint()
    return fx.GraphModule(backbone, part.graph)


def _usable(backbone: Backbone) -> Iterator[str]:
    """The stages, as timm names them, before which the backbone can be cut."""
    stages = [str(info.get("module", "")) for info in getattr(backbone.model, "feature_info", [])]
    for name, child in backbone.model.named_children():
        inside = any(stage.startswith(f"{name}.") for stage in stages)
        parts = [(f"{name}.{part}", one) for part, one in child.named_children()] if inside else []
        for stage, module in parts or [(name, child)]:
            if any(True for _ in module.parameters()):
                with suppress(_NoCut):
                    _cut(backbone, stage)
                    yield stage
