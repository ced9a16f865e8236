"""Your own classifier on the attended features: on the pooled vector, or on the map itself.

python examples/own_classifier.py --on vector
python examples/own_classifier.py --on map --data photos
"""

import torch
from data import batches, parser
from plain_loop import DEVICE, Classifier
from torch import nn

import ggam_fast


def own_head(on: str, channels: int, num_classes: int) -> ggam_fast.GGAMHead:
    """The head gets the classifier's class-score gradient from autograd; the rest stays in closed form."""
    if on == "vector":  # (N, C), pooled
        own = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 64), nn.GELU(), nn.Linear(64, num_classes)
        )
        return ggam_fast.GGAMHead(channels, num_classes, classifier=own, cam_norm="standardized")
    own = nn.Sequential(  # (N, C, H, W), the attended map D
        nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.GELU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, num_classes),
    )  # fmt: skip
    return ggam_fast.GGAMHead(channels, num_classes, classifier=own, pool_type="", cam_norm="standardized")


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--on", choices=["vector", "map"], default="vector", help="what your classifier takes"
    )
    arguments = options.parse_args()
    torch.manual_seed(0)
    loader, classes = batches(arguments)
    model = Classifier(len(classes))
    model.head = own_head(arguments.on, model.head.in_features, len(classes))
    model.to(DEVICE)
    loss_fn = ggam_fast.GGAMLoss(guidance_weight=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(arguments.epochs):
        total = 0.0
        for images, target in loader:
            images, target = images.to(DEVICE), target.to(DEVICE)
            loss = loss_fn(model.head(model.backbone(images), target), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}")


if __name__ == "__main__":
    main()
