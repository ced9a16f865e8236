"""The paper's two networks, ResNet-50 and VGG-16, from torchvision with a GGAM head.

python examples/torchvision_backbones.py --network vgg16
python examples/torchvision_backbones.py --network resnet50 --pretrained --data photos --side 448
"""

import torch
from data import batches, parser
from torch import nn
from torchvision import models  # type: ignore[import-untyped]

import ggam_fast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def backbone(network: str, pretrained: bool) -> tuple[nn.Module, int]:
    """The layers up to the last feature map, and its channels."""
    weights = "DEFAULT" if pretrained else None
    if network == "resnet50":
        layers = list(models.resnet50(weights=weights).children())
        return nn.Sequential(*layers[:-2]), 2048  # without pooling and the last linear layer
    return models.vgg16(weights=weights).features, 512


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--network", choices=["resnet50", "vgg16"], default="resnet50")
    options.add_argument("--pretrained", action="store_true", help="start from ImageNet weights (a download)")
    arguments = options.parse_args()
    torch.manual_seed(0)
    loader, classes = batches(arguments)

    features, channels = backbone(arguments.network, arguments.pretrained)
    head = ggam_fast.GGAMHead(channels, len(classes), cam_norm="standardized")
    model = nn.ModuleDict({"backbone": features, "head": head}).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for epoch in range(arguments.epochs):
        total = 0.0
        for images, target in loader:
            loss, _ = ggam_fast.functional.fused_ggam_loss(
                head, features(images.to(DEVICE)), target.to(DEVICE), guidance_weight=1e-3
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}")


if __name__ == "__main__":
    main()
