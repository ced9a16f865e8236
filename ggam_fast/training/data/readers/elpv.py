"""elpv: electroluminescence photographs of solar cells, from their own Python package."""

from __future__ import annotations

from pathlib import Path

import torch

from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.errors import TrainError

# Most modules in elpv have 60 cells: the cell type changes at rows 60, 360, 540 and 900.
BLOCK = 120
# Each of these splits has a fifth to a quarter of the rows. Of all such choices from the 22 blocks, this one
# has the class shares closest to those of the whole set.
VAL_BLOCKS = (0, 9, 13, 16, 19)
TEST_BLOCKS = (2, 4, 10, 15, 18)
_TYPES = ("mono", "poly")


def read(root: Path, cache: Path) -> ImageSet:
    """Electroluminescence photographs of 2,624 solar cells: 4 defect grades x 2 cell types.

    The grade is the probability of a defect that an expert gave: 0, 33, 67 or 100 %. The set has no boxes and
    no masks.

    The splits are blocks of consecutive rows, because neighbouring rows come from the same solar module and
    look alike. For 88 % of the images the nearest neighbour in feature space lies within 82 rows. A random
    split would therefore test on near copies of training images. With these blocks, 10 % of the test images
    have their nearest neighbour in the training split. With a random split of three quarters it is 74 %.
    """
    try:
        import elpv_dataset
    except ImportError as error:
        raise TrainError("--data elpv needs its package: pip install elpv-dataset") from error
    folder = Path(elpv_dataset.__file__).parent / "data"
    rows = [line.split() for line in (folder / "labels.csv").read_text().splitlines()]
    grades = torch.tensor([round(3 * float(probability)) for _, probability, _ in rows])
    types = torch.tensor([_TYPES.index(cell_type) for _, _, cell_type in rows])
    block = torch.arange(len(rows)) // BLOCK
    val = torch.isin(block, torch.tensor(VAL_BLOCKS))
    test = torch.isin(block, torch.tensor(TEST_BLOCKS))
    return ImageSet(
        name="elpv",
        files=tuple(folder / path for path, _, _ in rows),
        labels=4 * types + grades,
        classes=tuple(f"{kind} {grade} %" for kind in _TYPES for grade in (0, 33, 67, 100)),
        splits={
            name: mask.nonzero().flatten()
            for name, mask in (("train", ~(val | test)), ("val", val), ("test", test))
        },
        flips=((), (-1,), (-2,), (-2, -1)),
        notes=(
            "elpv-dataset: Buerhop-Lutz, Deitsch et al., licence CC BY-NC-SA 4.0 "
            "(attribution, no commercial use, share alike)",
            f"the splits are blocks of {BLOCK} rows, because neighbouring rows show the same solar module",
        ),
    )
