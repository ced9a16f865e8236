"""A timm model with a GGAM head for the Hugging Face Hub. It needs timm and huggingface_hub."""

import json
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .base import GGAMOutput
from .integrations import create_model

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    raise ImportError("HubModel needs huggingface_hub: pip install huggingface_hub") from error


class HubModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="ggam_fast",
    pipeline_tag="image-classification",
    tags=["ggam", "timm"],
):
    """`create_model` with `save_pretrained`, `from_pretrained` and `push_to_hub` of the Hugging Face Hub.

    `config.json` holds the model's name, its classes and every option that was given, and
    `model.safetensors` the weights. `from_pretrained` takes a folder or the name of a repository, and loads
    strictly.

    Args:
        name, num_classes, pretrained: as in `create_model`. `from_pretrained` never fetches timm's weights.
        classes: names of the K classes, or None. `num_classes` may then be left out.
        options: those of `create_model`. They stand in a JSON file, so layer types, modules, devices and
            types of numbers are errors: use `.to(device, dtype)`, and `replace_head` for a head of other
            layers.

    `forward`, `forward_features`, `forward_head`, `get_classifier` and `reset_classifier` are the model's,
    which is `.model`. `classes` is a tuple of names, or None.

    Raises:
        ImportError: timm or huggingface_hub is not installed.
        TypeError: an option does not fit into JSON.
        ValueError: `classes` and `num_classes` differ, or as in `create_model`.

    Examples:
        >>> model = ggam_fast.HubModel("resnet18", classes=["cat", "dog"], cam_norm="standardized")
        >>> model.save_pretrained("pets")
        >>> same = ggam_fast.HubModel.from_pretrained("pets")
    """

    _hub_mixin_config: dict[str, Any]

    def __init__(
        self,
        name: str,
        num_classes: int | None = None,
        *,
        classes: Sequence[str] | None = None,
        pretrained: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        for option, value in options.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError):
                raise TypeError(
                    f"{option} must fit into the JSON of config.json; got {type(value).__name__}: use "
                    ".to(device, dtype) afterwards, or replace_head for other layers"
                ) from None
        self.classes: tuple[str, ...] | None = None
        if classes is not None:
            if isinstance(classes, str) or not all(isinstance(c, str) for c in classes):
                raise TypeError(f"classes must be names of classes; got {classes!r}")
            self.classes = tuple(classes)
            num_classes = len(self.classes) if num_classes is None else num_classes
            if num_classes != len(self.classes):
                raise ValueError(f"classes must be num_classes={num_classes} names; got {len(self.classes)}")
        if num_classes is None:
            raise ValueError("num_classes must be given, or classes")
        built = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
        self.model: Any = create_model(name, num_classes, pretrained, **built)
        self._hub_mixin_config = {"name": name, "num_classes": num_classes, "classes": classes, **options}

    def forward(self, images: Tensor, target: Tensor | None = None) -> Tensor | GGAMOutput:
        """Logits (N, K); with `target` a GGAMOutput."""
        return self.model(images, target)

    def forward_features(self, images: Tensor) -> Tensor:
        """What the head is given."""
        return self.model.forward_features(images)

    def forward_head(
        self, features: Tensor, pre_logits: bool = False, target: Tensor | None = None
    ) -> Tensor | GGAMOutput:
        """What the head makes of features."""
        return self.model.forward_head(features, pre_logits, target)

    def get_classifier(self) -> nn.Module:
        """The GGAM head."""
        return self.model.get_classifier()

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the images: mean, deviation, size."""
        return self.model.pretrained_cfg

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False, **others: Any
    ) -> None:
        """Replace the last layer, as in timm. The names of the classes go if their number changes."""
        self.model.reset_classifier(num_classes, global_pool, reset_other, **others)
        head = self.model.get_classifier()
        if self.classes is not None and len(self.classes) != head.num_classes:
            self.classes = None
        self._hub_mixin_config.update(
            num_classes=head.num_classes, classes=self.classes, pool_type=head.pool_type,
            hidden_size=head.hidden_size,
        )  # fmt: skip

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **options: Any) -> "HubModel":
        return super()._from_pretrained(strict=strict, **options)
