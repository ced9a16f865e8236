"""A plain PyTorch training loop with a GGAM head.

python examples/plain_loop.py                # drawn shapes, seconds on a CPU
python examples/plain_loop.py --data photos  # your own folder of class folders
"""

import argparse

import torch
from data import batches, parser
from torch import Tensor, nn

import ggam_fast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Classifier(nn.Module):
    """A small convolutional backbone, and the head in place of pooling and a linear layer."""

    def __init__(self, num_classes: int, channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, channels)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.head = ggam_fast.GGAMHead(channels, num_classes, hidden_size=64, cam_norm="standardized")

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(self.backbone(images))  # inference computes no Grad-CAM
        assert isinstance(logits, Tensor)
        return logits


def train(arguments: argparse.Namespace) -> tuple[Classifier, list[str]]:
    torch.manual_seed(0)
    loader, classes = batches(arguments)
    model = Classifier(len(classes)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(arguments.epochs):
        total, right, seen = 0.0, 0, 0
        for images, target in loader:
            images, target = images.to(DEVICE), target.to(DEVICE)
            features = model.backbone(images)
            loss, out = ggam_fast.functional.fused_ggam_loss(
                model.head, features, target, guidance_weight=1e-3
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, seen = total + loss.item() * len(target), seen + len(target)
            right += int((out.logits.argmax(1) == target).sum())
        print(f"epoch {epoch + 1}: loss {total / seen:.4f}, accuracy {right / seen:.3f}")
    return model, classes


if __name__ == "__main__":
    train(parser(__doc__).parse_args())
