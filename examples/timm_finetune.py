"""Fine-tune a timm backbone with a GGAM head.

python examples/timm_finetune.py
python examples/timm_finetune.py --model resnet50 --pretrained --data photos --side 448
"""

from typing import Any

import timm
import torch
from data import batches, parser
from torch import nn

import ggam_fast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="resnet10t", help="timm model that ends in a feature map")
    options.add_argument("--pretrained", action="store_true", help="start from timm's weights (a download)")
    arguments = options.parse_args()
    torch.manual_seed(0)
    loader, classes = batches(arguments)

    # Without classifier and pooling, a timm model returns its last feature map.
    backbone: Any = timm.create_model(
        arguments.model, pretrained=arguments.pretrained, num_classes=0, global_pool=""
    )
    head = ggam_fast.GGAMHead(backbone.num_features, len(classes), cam_norm="standardized")
    model = nn.ModuleDict({"backbone": backbone, "head": head}).to(DEVICE)
    loss_fn = ggam_fast.GGAMLoss(guidance_weight=1e-3)
    optimizer = torch.optim.AdamW(
        [
            {"params": backbone.parameters(), "lr": 1e-4 if arguments.pretrained else 1e-3},
            {"params": head.parameters(), "lr": 1e-3},
        ]
    )
    for epoch in range(arguments.epochs):
        total = 0.0
        for images, target in loader:
            images, target = images.to(DEVICE), target.to(DEVICE)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                out = model["head"](model["backbone"](images), target)
                loss = loss_fn(out, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}")


if __name__ == "__main__":
    main()
