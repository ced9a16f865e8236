"""Show where a classifier looks in a photo: the photo, its spatial attention and its Grad-CAM.

    python examples/explain_photo.py --out explained.png
    python examples/explain_photo.py --data photos --photo photo.jpg --out explained.png

The classifier is the one that examples/plain_loop.py trains. `ggam-fast explain` does this for a run of
`ggam-fast train`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from data import MEAN, STD, DrawnShapes, parser
from matplotlib.figure import Figure
from plain_loop import DEVICE, train
from torch import Tensor

import ggam_fast


def photo(path: Path | None, side: int) -> Tensor:
    """A normalised image (1, 3, side, side)."""
    if path is None:
        return DrawnShapes(1000, side)[999][0].unsqueeze(0)  # none of those in training
    from PIL import Image
    from torchvision.transforms import functional as T  # type: ignore[import-untyped]

    image = T.center_crop(T.resize(Image.open(path).convert("RGB"), [side]), [side])
    normalised: Tensor = T.normalize(T.to_tensor(image), list(MEAN), list(STD))
    return normalised.unsqueeze(0)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--photo", type=Path, help="image file (default: a drawn shape)")
    options.add_argument("--out", type=Path, default=Path("explained.png"), help="picture that is written")
    arguments = options.parse_args()
    model, classes = train(arguments)
    model.eval()
    image = photo(arguments.photo, arguments.side)
    with torch.no_grad():
        features = model.backbone(image.to(DEVICE))
        predicted = model.head(features).argmax(1)
        out = model.head(features, predicted)
        grad_cam = ggam_fast.cam(features, out.cam_weights)  # (1, h, w)
    shown = (image[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).clamp(0, 1)
    figure = Figure(figsize=(9, 3.4))
    name = classes[int(predicted)]
    maps = {f"photo: {name}": None, "spatial attention": out.spatial_attention, "Grad-CAM": grad_cam}
    for axis, (title, heat) in zip(figure.subplots(1, 3), maps.items(), strict=True):
        axis.imshow(shown.permute(1, 2, 0))
        if heat is not None:
            size = (arguments.side, arguments.side)
            axis.imshow(F.interpolate(heat[None].cpu(), size, mode="bilinear")[0, 0], alpha=0.6)
        axis.set_title(title)
        axis.axis("off")
    figure.savefig(arguments.out, bbox_inches="tight")
    print(f"{name}, written to {arguments.out}")


if __name__ == "__main__":
    main()
