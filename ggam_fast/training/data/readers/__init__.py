"""Read data sets in their own layouts on disk into an `ImageSet`. Each data set has its own module.

Nothing is downloaded. `READERS` has the names that --data takes, each with its reader and its description.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.data.readers import aircraft, birds, cars, cub, elpv, folder, table, torchvision_sets
from ggam_fast.training.data.repeats import refuse_one_file_twice
from ggam_fast.training.data.splitting import Groups, with_validation
from ggam_fast.training.errors import TrainError


class Reader(NamedTuple):
    """How a data set is read and what it has.

    `read(root, cache)` reads it. `holds` says what --root must hold. `annotations` names its annotations.
    """

    read: Callable[[Path, Path], ImageSet]
    holds: str
    annotations: str
    source: str


READERS: dict[str, Reader] = {
    "elpv": Reader(
        elpv.read,
        "nothing, because elpv comes with the `train` extra",
        "none",
        "solar cells; Buerhop-Lutz, Deitsch et al.; CC BY-NC-SA 4.0",
    ),
    "folder": Reader(
        folder.read,
        "class folders, or train/ and test/ (or val/) that hold class folders",
        "none",
        "your own images",
    ),
    "birds": Reader(
        birds.read,
        "usr/ of the Debian packages tuxpaint-stamps-default and mate-backgrounds, unpacked",
        "boxes, masks",
        "cut-out birds on other backgrounds; GPL-2 and GPL-2+",
    ),
    "cub": Reader(
        cub.read,
        "CUB_200_2011/ (images.txt, train_test_split.txt, ...), or train/ and test/",
        "boxes, parts",
        "Caltech-UCSD Birds-200-2011; for research, non-commercial",
    ),
    "cars": Reader(
        cars.read,
        "stanford_cars/ (devkit/, cars_train/, cars_test/, ...), or train/ and test/",
        "boxes",
        "Stanford Cars; for research, non-commercial",
    ),
    "aircraft": Reader(
        aircraft.read,
        "fgvc-aircraft-2013b/ (data/images, data/*.txt), or train/ and test/",
        "boxes",
        "FGVC-Aircraft, variants; for research, non-commercial",
    ),
    "pets": Reader(
        torchvision_sets.pets,
        "oxford-iiit-pet/ (images/, annotations/)",
        "masks",
        "Oxford-IIIT Pet; CC BY-SA 4.0",
    ),
    "flowers": Reader(
        torchvision_sets.flowers,
        "flowers-102/ (jpg/, imagelabels.mat, setid.mat)",
        "none",
        "Oxford 102 Flowers; see the images' owners",
    ),
}


def read_images(
    name: str,
    root: Path | None,
    cache: Path,
    *,
    split_by: Path | None = None,
    val_fraction: float = 0.0,
) -> ImageSet:
    """Read the data set `name` from `root`. `cache` takes the files that a reader makes.

    `split_by`: the CSV file that `table.read` reads. `val_fraction`: share of the training images that become
    the validation split. Images of one group of the file stay in one split.

    Raises:
        TrainError: `root` is missing, it does not hold what the reader expects, or a file is in two splits.
    """
    if not 0 <= val_fraction < 1:
        raise TrainError(f"--val-fraction must be 0 or more and below 1; got {val_fraction}")
    if split_by is not None and name != "folder":
        raise TrainError(f"--split-by is for --data folder, because {name} has splits; got {split_by}")
    images, groups = _read(name, root, cache, split_by)
    refuse_one_file_twice(images)
    return with_validation(images, val_fraction, groups) if val_fraction else images


def _read(name: str, root: Path | None, cache: Path, split_by: Path | None) -> tuple[ImageSet, Groups | None]:
    if name == "elpv":
        if root is not None:
            raise TrainError(
                f"--data elpv takes no --root, because elpv comes with its package; got --root {root}"
            )
        return elpv.read(Path(), cache), None
    if root is None:
        raise TrainError(f"--data {name} needs --root, a folder that holds {READERS[name].holds}")
    if not root.is_dir():
        raise TrainError(f"--root {root} is not a folder")
    if split_by is not None:
        return table.read(root, split_by)
    return READERS[name].read(root, cache), None


def read_shifted(name: str, root: Path | None, cache: Path) -> ImageSet | None:
    """Test images of the same classes in surroundings of another kind than the training images, if any."""
    return birds.read_on_wallpapers(root, cache) if name == "birds" and root is not None else None
