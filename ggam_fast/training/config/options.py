"""Every option of a training run, with its default.

The command line shows them, and a checkpoint records them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ggam_fast import presets
from ggam_fast.training.errors import TrainError

# Files of older versions lack these options. Their heads had these values.
BEFORE: dict[str, Any] = {"attention_scale": "printed", "norm_eps": 1e-5}

# A larger image would take all memory before anything could tell so.
_LARGEST = 8192

DataName = Literal["elpv", "folder", "birds", "cub", "cars", "aircraft", "pets", "flowers"]


@dataclass(frozen=True)
class DataConfig:
    data: DataName = "elpv"
    """Name of the data set. `ggam-fast data list` explains all of them."""
    root: Path | None = None
    """Folder of the data set, such as one of class folders for --data folder."""
    image_size: int | None = None
    """Side of the square network input, in pixels. The default is the backbone's own size."""
    resize: int | None = None
    """Length of an image's shorter edge before the crop, in pixels. The default is the crop's side."""
    workers: int | None = None
    """Number of processes that decode images. By default 0 on the CPU and up to 8 on a GPU."""
    cache_dir: Path | None = None
    """Where cached feature maps are kept. By default $XDG_CACHE_HOME/ggam_fast or ~/.cache."""
    skip_bad_images: bool = False
    """Leave out files that cannot be read. They are counted and named."""
    enlarge: bool = False
    """Allow images that are smaller than the network's input."""
    val_fraction: float = 0.0
    """Share of the training images of each class that become the validation split. 0 draws none."""
    split_by: Path | None = None
    """CSV file for --data folder, with columns path, label, split and group. Only path is needed. A group is
    never in two splits."""


@dataclass(frozen=True)
class BackboneConfig:
    backbone: str = "tf_efficientnet_lite0"
    """Name of a timm model. It must end in a feature map or in patch tokens."""
    pretrained: bool = True
    """Start from ImageNet weights. The `train` extra includes those of the default backbone."""
    finetune: bool = False
    """Train the backbone too. Otherwise it is frozen, and its maps are computed once and cached."""
    finetune_from: str | None = None
    """Train the backbone from this module on, such as blocks.5 or layer4. The maps that enter it are computed
    once and cached."""

    @property
    def tuned(self) -> str:
        """Which part of the backbone is trained, in words."""
        if self.finetune_from is not None:
            return f"fine-tuned from {self.finetune_from} on"
        return "fine-tuned" if self.finetune else "frozen"


@dataclass(frozen=True)
class HeadConfig:
    """The options of `ggam_fast.GGAMHead`, by the same names."""

    preset: Literal["paper", "release"] | None = None
    """Start from the options of a published source. Other options override it."""
    attention: Literal["channel_spatial", "channel", "spatial", "none"] = "channel_spatial"
    """Attention of the head."""
    rd_ratio: float = 1 / 16
    """Hidden width of the channel attention, as a share of C."""
    spatial_norm: Literal["softmax", "sum", "sigmoid"] = "softmax"
    """Norm of the channel sum. The result is the spatial attention."""
    pool_type: Literal["avg", "max", "flatten"] = "avg"
    """How the attended map reaches the classifier."""
    attention_scale: Literal["unit_mean", "printed"] = "unit_mean"
    """Scale of the attended map. With unit_mean its weights average to one. With printed they are 1/L of
    that, as the paper prints them."""
    hidden_size: int = 512
    """Width of the classifier's hidden layer; 0 for one linear layer."""
    norm_eps: float = 0.01
    """Eps of the classifier's first batch norm. The larger it is, the less the norm amplifies channels that
    hardly vary. The default was chosen on the validation images of elpv. These are its accuracies in percent,
    as means of seeds 0 to 4 with the standard error in brackets (`ggam-fast train --no-compile --seed S
    --norm-eps E`): 1e-5 75.4 (0.5), 1e-3 76.2 (0.4), 0.01 76.2 (0.2), 0.024 76.0 (0.3), 0.1 75.6 (0.4),
    0.3 75.2 (0.3)."""
    drop_rate: float = 0.0
    """Dropout before the classifier."""
    cam_at: Literal["features", "attended"] = "features"
    """Feature map at which the Grad-CAM weights are computed."""
    cam_class: Literal["label", "predicted"] = "label"
    """Class whose Grad-CAM guides the attention."""
    cam_detach: bool = True
    """Treat the Grad-CAM weights as constants; --no-cam-detach differentiates through them."""
    cam_norm: Literal["sigmoid", "softmax", "standardized", "standardized_softmax"] = "standardized"
    """Normalization that makes Grad-CAM weights comparable with channel attention."""
    cam_temperature: float = 1.0
    """Divides the Grad-CAM weights before their normalization."""
    divergence: Literal["symmetric", "forward", "reverse"] = "symmetric"
    """Kullback-Leibler divergence of the guidance loss."""
    guidance_reduction: Literal["mean", "sum"] = "mean"
    """How the guidance losses of a batch become one number."""
    position_guidance: Literal["none", "relu", "standardized_softmax"] = "none"
    """Target of the spatial attention, made from the class activation map. Its loss KL(q, T) is added to the
    others, times --position-weight. It needs spatial attention and --spatial-norm softmax."""
    position_temperature: float = 1.0
    """Divides the z-scores of the class activation map, with --position-guidance standardized_softmax."""

    @classmethod
    def from_preset(cls, name: Literal["paper", "release"]) -> HeadConfig:
        """The options of `ggam_fast.presets.PAPER` or `.RELEASE`, with torch's default eps for batch norm."""
        source = {"paper": presets.PAPER, "release": presets.RELEASE}[name]
        return cls(preset=name, **{"norm_eps": BEFORE["norm_eps"], **source})

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> HeadConfig:
        """The options that belong to `keywords` of this or an older version."""
        return cls(**{**BEFORE, **saved})

    def keywords(self) -> dict[str, Any]:
        """The constructor keywords of `ggam_fast.GGAMHead`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preset"}


@dataclass(frozen=True)
class OptimConfig:
    recipe: Literal["modern", "paper"] = "modern"
    """Start from a whole set of training options. Other options override it."""
    epochs: int = 6
    """Passes over the training split. With a frozen backbone, the split also holds the mirror image of every
    image."""
    batch_size: int = 64
    """Images in a batch. Under torchrun, each process has batches of this size."""
    accumulate: int = 1
    """Number of batches whose gradients are added up for one step."""
    optimizer: str = "adamw"
    """Optimizer: adamw, sgd with momentum 0.9, or another one of timm, such as lion or muon."""
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    """Schedule of the learning rate."""
    warmup_epochs: float | None = None
    """Epochs in which the learning rate rises. By default a fifth of them with one_cycle, and none with
    cosine."""
    lr: float = 3e-4
    """Highest learning rate of the head."""
    backbone_lr: float = 1e-4
    """Highest learning rate of the backbone, with --finetune or --finetune-from."""
    layer_decay: float = 1.0
    """Learning rate of each layer of the backbone, as a share of the next one's. 1 gives all the same."""
    freeze_epochs: int = 0
    """Epochs at the start in which the head alone is trained, with --finetune or --finetune-from."""
    weight_decay: float = 0.01
    """Weight decay of the optimizer."""
    clip_grad: float = 0.0
    """Largest norm of all gradients together. 0 sets no limit."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of classes in the cross entropy. balanced makes them inverse to the number of training
    images."""
    balanced_sampling: bool = False
    """Draw the images of an epoch so that all classes come equally often. Some then come several times."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    mixup: float = 0.0
    """Mix pairs of images with a share from Beta(mixup, mixup). 0 turns it off."""
    cutmix: float = 0.0
    """Paste patches between images, their area from Beta(cutmix, cutmix). 0 turns it off."""
    rand_augment: int = 0
    """Magnitude of RandAugment, from 1 to 30: two random operations on each image. 0 turns it off."""
    color_jitter: float = 0.0
    """Largest change of brightness, contrast and saturation, as a share. 0 turns it off."""
    random_erasing: float = 0.0
    """Probability that a rectangle of an image is erased."""
    ema: float = 0.0
    """Decay of a running average of the weights. The average is tested and saved. 0 turns it off."""
    patience: int = 0
    """Stop after this many epochs without a better validation result. 0 runs all epochs."""
    best_by: Literal["accuracy", "loss"] = "accuracy"
    """Validation result that makes an epoch the best one. Without a validation split it is the training
    loss."""
    guidance_weight: float = 1e-3
    """Lambda: the loss is cross entropy + lambda * guidance."""
    position_weight: float = 1.0
    """Weight of the position loss, with --position-guidance."""
    seed: int = 0
    """Seed of initial weights, batches and augmentation."""


@dataclass(frozen=True)
class RunConfig:
    out: Path | None = None
    """Folder of the results. The default is runs/<data>-<time>."""
    overwrite: bool = False
    """Allow a folder that already holds a run, and remove the files of that run."""
    resume: Path | None = None
    """Folder of a run to continue with its own options. A finished run goes on with more --epochs."""
    init_from: Path | None = None
    """Run, or checkpoint of one, whose weights this run starts from. The head starts anew if it has other
    classes or options."""
    save_every: int = 0
    """Steps between snapshots within an epoch. 0 takes them only at the end of each epoch."""
    log_to: tuple[Literal["csv", "tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where losses and accuracies go besides log.jsonl, one or several. Without a value it is log.jsonl
    alone."""
    device: str = "auto"
    """Device, such as cpu or cuda:1. auto is the first GPU, or the CPU if there is none."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the backbone. auto is bfloat16 on a GPU that has it, else float32."""
    compile: bool = True
    """Compile the training step with torch.compile."""


def check_optimizer(name: str) -> None:
    """Raise a `TrainError` if there is no optimizer `name`, or if it needs more than a plain step."""
    if name in ("adamw", "sgd"):
        return
    from timm.optim import list_optimizers  # here, because it takes time that most commands do not need

    # These need other packages, or second derivatives.
    known = [str(one) for one in list_optimizers(exclude_filters=["bnb*", "fused*", "adahessian"])]
    if name not in known:
        raise TrainError(f"--optimizer must be one of {', '.join(known)}; got {name}")


@dataclass(frozen=True)
class TrainConfig:
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise a `TrainError` if a number is out of range or two options exclude each other."""
        optim = self.optim
        infinity = float("inf")
        for name, value, least, below in (
            ("--epochs", optim.epochs, 1, infinity),
            ("--batch-size", optim.batch_size, 2, infinity),
            ("--accumulate", optim.accumulate, 1, infinity),
            ("--image-size", self.data.image_size, 16, _LARGEST + 1),
            ("--resize", self.data.resize, self.data.image_size or 16, _LARGEST + 1),
            ("--workers", self.data.workers, 0, infinity),
            ("--patience", optim.patience, 0, infinity),
            ("--warmup-epochs", optim.warmup_epochs, 0, infinity),
            ("--freeze-epochs", optim.freeze_epochs, 0, infinity),
            ("--save-every", self.run.save_every, 0, infinity),
            ("--lr", optim.lr, 0, infinity),
            ("--backbone-lr", optim.backbone_lr, 0, infinity),
            ("--weight-decay", optim.weight_decay, 0, infinity),
            ("--clip-grad", optim.clip_grad, 0, infinity),
            ("--mixup", optim.mixup, 0, infinity),
            ("--cutmix", optim.cutmix, 0, infinity),
            ("--guidance-weight", optim.guidance_weight, 0, infinity),
            ("--position-weight", optim.position_weight, 0, infinity),
            ("--label-smoothing", optim.label_smoothing, 0, 1),
            ("--rand-augment", optim.rand_augment, 0, 31),
            ("--color-jitter", optim.color_jitter, 0, 1),
            ("--random-erasing", optim.random_erasing, 0, 1),
            ("--ema", optim.ema, 0, 1),
            ("--seed", optim.seed, -(2**63), 2**63),
        ):
            if value is not None and not (least <= value < below):
                ending = "or more" if below == infinity else f"or more and below {below}"
                raise TrainError(f"{name} must be {least} {ending}; got {value}")
        self._check_trained_backbone()
        if optim.position_weight not in (0, OptimConfig.position_weight) and not self.guides_positions:
            raise TrainError(
                "--position-weight needs --position-guidance relu or standardized_softmax; got "
                f"--position-weight {optim.position_weight:g}"
            )
        if optim.balanced_sampling and optim.class_weights == "balanced":
            raise TrainError(
                "--balanced-sampling and --class-weights balanced both favour rare classes; leave out one"
            )
        check_optimizer(optim.optimizer)
        for name, value, what in (
            ("--cutmix", optim.cutmix, "pastes patches of images"),
            ("--rand-augment", optim.rand_augment, "changes images"),
            ("--color-jitter", optim.color_jitter, "changes images"),
            ("--random-erasing", optim.random_erasing, "changes images"),
        ):
            if value and not self.backbone.finetune:
                raise TrainError(
                    f"{name} {what}, but the maps of a frozen backbone, or of its frozen first layers, are "
                    f"computed earlier; use --finetune or --mixup; got {name} {value}"
                )

    def _check_trained_backbone(self) -> None:
        backbone, optim = self.backbone, self.optim
        if backbone.finetune and backbone.finetune_from is not None:
            raise TrainError(
                f"--finetune trains the whole backbone, and --finetune-from {backbone.finetune_from} a part "
                "of it; leave out one of them; with --recipe paper, --no-finetune leaves out the first"
            )
        if not 0 < optim.layer_decay <= 1:
            raise TrainError(f"--layer-decay must be above 0 and at most 1; got {optim.layer_decay}")
        if optim.warmup_epochs is not None and optim.warmup_epochs >= optim.epochs:
            raise TrainError(
                f"--warmup-epochs must be below --epochs {optim.epochs}; got {optim.warmup_epochs:g}"
            )
        for name, value, without in (
            ("--layer-decay", optim.layer_decay, 1),
            ("--freeze-epochs", optim.freeze_epochs, 0),
        ):
            if value != without and not backbone.finetune and backbone.finetune_from is None:
                raise TrainError(f"{name} {value:g} needs a trained backbone: --finetune or --finetune-from")

    @property
    def guides_positions(self) -> bool:
        return self.head.position_guidance != "none"

    def values(self) -> dict[str, Any]:
        """Every option by its own name, without the sections."""
        return {f.name: getattr(section, f.name) for section in self._sections() for f in fields(section)}

    def replaced(self, values: Mapping[str, Any]) -> TrainConfig:
        """A copy in which the options in `values` are replaced. Names are those of `values()`."""
        return replace(
            self,
            **{
                f.name: replace(
                    section, **{g.name: values[g.name] for g in fields(section) if g.name in values}
                )
                for f, section in zip(fields(self), self._sections(), strict=True)
            },
        )

    def _sections(self) -> list[Any]:
        return [getattr(self, f.name) for f in fields(self)]
