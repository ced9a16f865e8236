"""Every option of a training run, with its default: what the command line shows and what a
checkpoint records."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ggam_fast import presets
from ggam_fast.training.errors import TrainError


@dataclass(frozen=True)
class DataConfig:
    data: Literal["elpv", "folder"] = "elpv"
    """elpv: photographs of solar cells, installed with the `train` extra. folder: your images."""
    root: Path | None = None
    """With --data folder: a folder of class folders, or one that holds train/ and test/ (or val/)."""
    image_size: int | None = None
    """Side of the square network input. By default what the backbone was trained on."""
    workers: int | None = None
    """Processes that decode images. By default none on the CPU and up to 8 on a GPU."""
    cache_dir: Path | None = None
    """Where cached feature maps are kept. By default $XDG_CACHE_HOME/ggam_fast or ~/.cache."""


@dataclass(frozen=True)
class BackboneConfig:
    backbone: str = "tf_efficientnet_lite0"
    """Any timm model that ends in a feature map or in patch tokens."""
    pretrained: bool = True
    """Start from ImageNet weights. The default backbone's come with the `train` extra."""
    finetune: bool = False
    """Train the backbone too. Otherwise it is frozen and its maps are computed once and cached."""


@dataclass(frozen=True)
class HeadConfig:
    """The options of `ggam_fast.GGAMHead`, under the same names."""

    preset: Literal["paper", "release"] | None = None
    """Start from all options of one published source; those given beside it win."""
    attention: Literal["channel_spatial", "channel", "spatial", "none"] = "channel_spatial"
    """Which of the two attentions act."""
    rd_ratio: float = 1 / 16
    """Hidden channels of the channel attention, as a share of the backbone's channels."""
    spatial_norm: Literal["softmax", "sum", "sigmoid"] = "softmax"
    """How the channel sum becomes the spatial attention."""
    pool_type: Literal["avg", "max", "flatten"] = "avg"
    """How the attended map reaches the classifier."""
    hidden_size: int = 512
    """Width of the classifier's hidden layer; 0 for one linear layer."""
    drop_rate: float = 0.0
    """Dropout before the classifier."""
    cam_at: Literal["features", "attended"] = "features"
    """Where the Grad-CAM weights are taken: at the backbone's map or at the attended one."""
    cam_class: Literal["label", "predicted"] = "label"
    """Which class's Grad-CAM guides the attention."""
    cam_detach: bool = True
    """Treat the Grad-CAM weights as constants; --no-cam-detach differentiates through them."""
    cam_norm: Literal["sigmoid", "softmax", "standardized"] = "standardized"
    """How the Grad-CAM weights become comparable with the channel attention."""
    cam_temperature: float = 1.0
    """Divides the Grad-CAM weights before that."""
    divergence: Literal["symmetric", "forward"] = "symmetric"
    """Which Kullback-Leibler divergence the guidance is."""
    guidance_reduction: Literal["mean", "sum"] = "mean"
    """Of the guidance over the batch."""

    @classmethod
    def from_preset(cls, name: Literal["paper", "release"]) -> HeadConfig:
        """The options of `ggam_fast.presets.PAPER` or `.RELEASE`."""
        source = {"paper": presets.PAPER, "release": presets.RELEASE}[name]
        return cls(preset=name, **source)

    def keywords(self) -> dict[str, Any]:
        """The constructor keywords of `ggam_fast.GGAMHead`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preset"}


@dataclass(frozen=True)
class OptimConfig:
    epochs: int = 6
    """Passes over the training split; a frozen backbone's holds every image and its mirrorings."""
    batch_size: int = 64
    """Images a step."""
    lr: float = 3e-4
    """Highest learning rate of the head (AdamW, one cycle)."""
    backbone_lr: float = 1e-4
    """The backbone's, with --finetune."""
    weight_decay: float = 0.01
    """Of AdamW."""
    guidance_weight: float = 1e-3
    """Lambda: the loss is cross entropy + lambda * guidance."""
    seed: int = 0
    """Of initial weights, of the batches and of the augmentation."""


@dataclass(frozen=True)
class RunConfig:
    out: Path | None = None
    """Folder of the results. By default runs/<data>-<time>."""
    overwrite: bool = False
    """Allow a folder that already holds a run."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    compile: bool = True
    """Compile the training step with torch.compile."""


@dataclass(frozen=True)
class TrainConfig:
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise a `TrainError` for a number out of range."""
        optim = self.optim
        for name, value, least in (
            ("--epochs", optim.epochs, 1),
            ("--batch-size", optim.batch_size, 2),
            ("--image-size", self.data.image_size, 16),
            ("--workers", self.data.workers, 0),
            ("--lr", optim.lr, 0),
            ("--backbone-lr", optim.backbone_lr, 0),
            ("--weight-decay", optim.weight_decay, 0),
            ("--guidance-weight", optim.guidance_weight, 0),
        ):
            if value is not None and not (least <= value < float("inf")):
                raise TrainError(f"{name} must be {least} or more; got {value}")
