"""A GGAM head in a LightningModule.

python examples/lightning_module.py
python examples/lightning_module.py --data photos --side 224
"""

import pytorch_lightning as pl
import torch
from data import batches, parser
from plain_loop import Classifier
from torch import Tensor

import ggam_fast


class Guided(pl.LightningModule):
    """The loss is cross entropy + 0.001 * guidance; Lightning runs everything else as usual."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model = Classifier(num_classes)
        self.loss_fn = ggam_fast.GGAMLoss(guidance_weight=1e-3)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, target = batch
        out = self.model.head(self.model.backbone(images), target)
        loss: Tensor = self.loss_fn(out, target)
        self.losses.append(loss.item())
        self.log("guidance", out.guidance_loss)
        return loss

    def on_train_epoch_end(self) -> None:
        mean = sum(self.losses) / len(self.losses)
        print(f"epoch {self.current_epoch + 1}: loss {mean:.4f}")
        self.losses.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    arguments = parser(__doc__).parse_args()
    pl.seed_everything(0, verbose=False)
    loader, classes = batches(arguments)
    trainer = pl.Trainer(
        max_epochs=arguments.epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Guided(len(classes)), loader)
