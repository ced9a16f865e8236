"""Draw a small folder of images without any licence. Each shows one of four shapes on a textured ground.

The README shows the gallery of a run on these images:

    python tests/training/shapes.py shapes && ggam-fast train --data folder --root shapes --epochs 20
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 224
CORNERS = {"triangle": 3, "square": 4, "pentagon": 5, "disc": 90}


def draw(corners: int, random: np.random.Generator) -> Image.Image:
    ground = Image.fromarray(random.integers(70, 190, (10, 10, 3), dtype=np.uint8))
    picture = ground.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    radius = random.uniform(20, 34)
    x, y = random.uniform(radius, SIZE - radius, 2)
    colour = tuple(int(value) for value in random.integers(90, 256, 3))
    turn = random.uniform(0, 360)
    ImageDraw.Draw(picture).regular_polygon((x, y, radius), corners, turn, fill=colour, outline="black")
    return picture.filter(ImageFilter.GaussianBlur(0.8))


def main(root: Path, images: int = 120) -> None:
    random = np.random.default_rng(0)
    for name, corners in CORNERS.items():
        (root / name).mkdir(parents=True)
        for index in range(images):
            draw(corners, random).save(root / name / f"{index:03}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
