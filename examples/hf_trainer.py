"""A GGAM head on a Hugging Face backbone, trained by their Trainer.

python examples/hf_trainer.py
python examples/hf_trainer.py --model microsoft/resnet-50 --data photos --side 224
"""

import tempfile
from typing import Any

import torch
from data import images, parser
from torch import Tensor, nn
from transformers import AutoModel, ResNetConfig, ResNetModel, Trainer, TrainingArguments

import ggam_fast


class Classifier(nn.Module):
    """`forward` returns what the Trainer expects: the loss, if there are labels, and the logits."""

    def __init__(self, backbone: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = ggam_fast.GGAMHead(channels, num_classes, cam_norm="standardized")
        self.loss_fn = ggam_fast.GGAMLoss(guidance_weight=1e-3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        features = self.backbone(pixel_values).last_hidden_state  # (N, C, H, W)
        if labels is None:
            return {"logits": self.head(features)}
        out = self.head(features, labels)
        return {"loss": self.loss_fn(out, labels), "logits": out.logits}


def collate(rows: list[tuple[Tensor, int]]) -> dict[str, Any]:
    pictures, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(pictures), "labels": torch.tensor(labels)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", help="model of the hub that ends in a feature map (default: a small one)")
    arguments = options.parse_args()
    torch.manual_seed(0)
    found, classes = images(arguments.data, arguments.images, arguments.side)
    small = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    backbone: Any = AutoModel.from_pretrained(arguments.model) if arguments.model else ResNetModel(small)
    model = Classifier(backbone, backbone.config.hidden_sizes[-1], len(classes))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=arguments.epochs, per_device_train_batch_size=arguments.batch_size,
            learning_rate=3e-3, logging_strategy="epoch", save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, dataloader_drop_last=True,
        )  # fmt: skip
        trainer = Trainer(model, settings, data_collator=collate, train_dataset=found)
        trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"epoch {entry['epoch']:.0f}: loss {float(entry['loss']):.4f}")


if __name__ == "__main__":
    main()
