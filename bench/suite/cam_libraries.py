"""Channel weights beta from given features, as three published Grad-CAM libraries compute them.

The public call of each library also draws and resizes a map, so the benchmark calls the functions below it.
It times the library's own forward pass, the gradient of the class score and the mean over positions.  No
parameter requires a gradient, and nothing is copied to the host.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Beta = Callable[[Tensor, Tensor], Tensor]


class _Model(nn.Module):
    """A module with a layer whose output the libraries watch, and the head after it."""

    def __init__(self, head: nn.Module, positions_axis: int | tuple[int, int]):
        super().__init__()
        self.features, self.head = nn.Identity(), head
        self.positions_axis = positions_axis

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def build(library: str, head: nn.Module, tokens: bool) -> Beta:
    """The named library's beta (N, C) for the scores of the target.

    Raises ImportError if the library is not installed.
    """
    model = _Model(head.requires_grad_(False), 1 if tokens else (2, 3))
    return {"grad_cam": _grad_cam, "captum": _captum, "torchcam": _torchcam}[library](model)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _grad_cam(model: _Model) -> Beta:
    from pytorch_grad_cam.activations_and_gradients import ActivationsAndGradients

    hooks = ActivationsAndGradients(model, [model.features], None, detach=False)

    def beta(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            hooks(_leaf(x)).gather(1, y.unsqueeze(1)).sum().backward()
        return hooks.gradients[0].mean(model.positions_axis)

    return beta


def _captum(model: _Model) -> Beta:
    from captum._utils.gradient import compute_layer_gradients_and_eval

    def beta(x: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            gradients: Any = compute_layer_gradients_and_eval(model, model.features, _leaf(x), y)[0]
        return gradients[0].mean(model.positions_axis)

    return beta


def _torchcam(model: _Model) -> Beta:
    from torchcam.methods import GradCAM

    if model.positions_axis == 1:
        raise NotImplementedError(
            "torchcam averages over the axes after the second, so it cannot average tokens"
        )
    extractor = GradCAM(model, "features")
    # torchcam takes Python numbers.  They are copied from the device once, not at every call.
    classes: dict[int, list[int]] = {}

    def beta(x: Tensor, y: Tensor) -> Tensor:
        if id(y) not in classes:
            classes[id(y)] = y.tolist()
        with torch.enable_grad():
            return extractor._get_weights(classes[id(y)], model(_leaf(x)))[0]

    return beta
