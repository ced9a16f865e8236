"""A model class of transformers with a GGAM head: config, save_pretrained, from_pretrained, Trainer.

python examples/hf_model.py
python examples/hf_model.py --data photos --side 224
"""

import tempfile
from typing import Any

import torch
from data import images, parser
from hf_trainer import collate
from torch import Tensor
from transformers import (
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    Trainer,
    TrainingArguments,
)

import ggam_fast


class GuidedConfig(PreTrainedConfig):
    """The backbone's configuration, the head's options, and the weight of the guidance."""

    model_type = "ggam-resnet"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        head: dict[str, Any] | None = None,
        guidance_weight: float = 1e-3,
        **others: Any,
    ) -> None:
        self.backbone, self.head, self.guidance_weight = backbone or {}, head or {}, guidance_weight
        super().__init__(**others)


class GuidedModel(PreTrainedModel):
    """Gives (loss, GGAMOutput) with labels and (logits,) without, which the Trainer understands."""

    config_class = GuidedConfig
    main_input_name = "pixel_values"

    def __init__(self, config: GuidedConfig) -> None:
        super().__init__(config)
        backbone: Any = ResNetConfig(**config.backbone)
        self.backbone = ResNetModel(backbone)
        classes: Any = config.num_labels
        self.head = ggam_fast.GGAMHead(backbone.hidden_sizes[-1], classes, **config.head)
        self.loss_fn = ggam_fast.GGAMLoss(config.guidance_weight)
        finish: Any = self.post_init
        finish()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor] | tuple[Tensor, ggam_fast.GGAMOutput]:
        features = self.backbone(pixel_values).last_hidden_state  # (N, C, H, W)
        if labels is None:
            return (self.head(features),)
        out = self.head(features, labels)
        return self.loss_fn(out, labels), out


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    out: Any = prediction.predictions  # a GGAMOutput of arrays
    return {"accuracy": float((out.logits.argmax(1) == prediction.label_ids).mean())}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.manual_seed(0)
    found, classes = images(arguments.data, arguments.images, arguments.side)
    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    config = GuidedConfig(
        backbone=small,
        head={"cam_norm": "standardized"},
        id2label=dict(enumerate(classes)),
        label2id={name: index for index, name in enumerate(classes)},
    )
    model: Any = GuidedModel(config)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=arguments.epochs, per_device_train_batch_size=arguments.batch_size,
            learning_rate=3e-3, logging_strategy="epoch", save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, dataloader_drop_last=True,
        )  # fmt: skip
        trainer = Trainer(
            model, settings, data_collator=collate, train_dataset=found, eval_dataset=found,
            compute_metrics=accuracy,
        )  # fmt: skip
        trainer.train()
        scores = trainer.evaluate()
        model.save_pretrained(folder)
        loaded: Any = GuidedModel.from_pretrained(folder)
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"epoch {entry['epoch']:.0f}: loss {float(entry['loss']):.4f}")
    print(f"accuracy on its own images {scores['eval_accuracy']:.3f}")
    pixels = collate([found[0], found[1]])["pixel_values"]
    with torch.no_grad():
        same = torch.equal(loaded.eval()(pixels)[0], model.eval().cpu()(pixels)[0])
    print(f"{type(loaded).__name__} of {loaded.config.num_labels} classes, loaded again: {same}")


if __name__ == "__main__":
    main()
