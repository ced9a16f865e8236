"""birds-on-backgrounds: cut-out photographs of birds on photographs of other places.

Each class has one photograph. Accuracy therefore measures how well a model finds a known bird in a new scene,
not how well it knows a species. The set is useful for its exact masks, which come from the alpha channels of
the cut-outs. They show whether attention and Grad-CAM lie on the bird.

The birds are from Debian's tuxpaint-stamps-default (GPL-2), the backgrounds from mate-backgrounds (GPL-2+).
No background is in two splits. `read_on_wallpapers` puts the same birds on backgrounds of another kind.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from ggam_fast.training.data.annotations import Annotations, box_of
from ggam_fast.training.data.image_set import ImageSet, read_image
from ggam_fast.training.data.readers.tree import is_image
from ggam_fast.training.errors import TrainError
from ggam_fast.training.system.cache import problem, remove_dead_parts, store_folder
from ggam_fast.training.system.files import locked

logger = logging.getLogger(__name__)

STAMPS = Path("usr/share/tuxpaint/stamps/animals/birds")  # its folder cartoon/ is left out
BACKGROUNDS = Path("usr/share/backgrounds/mate/nature")
WALLPAPERS = (
    "abstract/Elephants.jpg", "abstract/Flow.png", "abstract/Gulp.png", "desktop/Float-into-MATE.png",
    "desktop/Stripes.png", "desktop/Ubuntu-Mate-Cold-no-logo.png", "desktop/Ubuntu-Mate-Warm-no-logo.png",
)  # fmt: skip
"""Wallpapers that were painted or drawn, in the folder beside the photographs."""

SPLIT_OF_BACKGROUND = {
    "train": ("Aqua", "Dune", "FreshFlower", "GreenMeadow", "LadyBird", "Wood"),
    "val": ("RainDrops", "YellowFlower"),
    "test": ("Blinds", "Garden", "Storm", "TwoWings"),
}
SCENES = {"train": 24, "val": 6, "test": 12}
"""Number of images of each bird in each split."""

SIZE = 288
"""Side of an image in pixels."""

# These are second pictures of birds that the set already has.
_LEFT_OUT = ("heron_greatblue_flying",)
_OPAQUE = 127
_LENGTH = (0.35, 0.8)  # the bird's longer side, as a share of SIZE
_TILT = 15.0  # degrees to either side
_LIGHT = (0.8, 1.2)  # factor for the bird's brightness and contrast and for the background's brightness
_CROP = (0.3, 1.0)  # side of the crop, as a share of the background's shorter side
_RECIPE = 1  # add 1 with every change of how a scene looks


class _Scene(NamedTuple):
    split: str
    bird: Path
    number: int

    def path(self, folder: Path, suffix: str) -> Path:
        return folder / self.split / self.bird.stem / f"{self.number:03d}{suffix}"


def read(root: Path, cache: Path) -> ImageSet:
    """The set made from the two packages unpacked into `root`. The first call composes it into `cache`."""
    _birds(root)
    places = {path.stem: path for path in _pictures(root / BACKGROUNDS, "*.jpg")}
    for name in (name for names in SPLIT_OF_BACKGROUND.values() for name in names):
        if name not in places:
            raise TrainError(
                f"--root {root} has no {name}.jpg in {BACKGROUNDS}; unpack mate-backgrounds there"
            )
    return _set(
        root,
        cache,
        places,
        SCENES,
        SPLIT_OF_BACKGROUND,
        (
            "birds-on-backgrounds: each class is one photograph on many backgrounds, and no background is in "
            "two splits. The set measures how well a known bird is found in a new scene",
            "birds from tuxpaint-stamps-default (GPL-2), backgrounds from mate-backgrounds (GPL-2+)",
        ),
    )


def read_on_wallpapers(root: Path, cache: Path) -> ImageSet:
    """The same birds on wallpapers that were painted or drawn, all in the test split.

    A model that was trained on `read` has seen no background of this kind.
    """
    folder = root / BACKGROUNDS.parent
    missing = [name for name in WALLPAPERS if not (folder / name).is_file()]
    if missing:
        raise TrainError(
            f"--root {root} has no {missing[0]} in {BACKGROUNDS.parent}; unpack mate-backgrounds there"
        )
    places = {Path(name).stem: folder / name for name in WALLPAPERS}
    note = "the birds of birds-on-backgrounds on wallpapers that were painted or drawn"
    return _set(root, cache, places, {"test": SCENES["test"]}, {"test": tuple(places)}, (note,))


def _set(
    root: Path,
    cache: Path,
    places: dict[str, Path],
    count_of: dict[str, int],
    places_of: dict[str, tuple[str, ...]],
    notes: tuple[str, ...],
) -> ImageSet:
    """Every bird in `count_of` scenes of each split, on the backgrounds `places_of` that split."""
    birds = _birds(root)
    scenes = [
        _Scene(split, bird, index)
        for split, count in count_of.items()
        for bird in birds
        for index in range(count)
    ]
    folder = _composed(cache, scenes, places, count_of, places_of)

    def mask(row: int) -> Tensor:
        with Image.open(scenes[row].path(folder, ".mask.png")) as image:
            return torch.from_numpy(np.array(image)) > _OPAQUE

    splits = np.array([scene.split for scene in scenes])
    return ImageSet(
        name="birds",
        files=tuple(scene.path(folder, ".jpg") for scene in scenes),
        labels=torch.tensor([birds.index(scene.bird) for scene in scenes]),
        classes=tuple(bird.stem for bird in birds),
        splits={split: torch.from_numpy(np.flatnonzero(splits == split)) for split in count_of},
        flips=((), (-1,)),
        notes=notes,
        annotations=Annotations(boxes=_boxes(folder), masks=mask),
    )


def _birds(root: Path) -> list[Path]:
    birds = [path for path in _pictures(root / STAMPS, "*.png") if path.stem not in _LEFT_OUT]
    if not birds:
        raise TrainError(f"--root {root} has no *.png in {STAMPS}; unpack tuxpaint-stamps-default there")
    return birds


def _pictures(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if is_image(path.name))


_BOXES = "boxes.json"


def _boxes(folder: Path) -> Tensor:
    return torch.tensor(json.loads((folder / _BOXES).read_text()), dtype=torch.float32)


def _composed(
    cache: Path,
    scenes: list[_Scene],
    places: dict[str, Path],
    count_of: dict[str, int],
    places_of: dict[str, tuple[str, ...]],
) -> Path:
    """The folder of the composed images. It is made whole or not at all."""
    inputs = [(path.name, path.stat().st_size) for path in sorted({scene.bird for scene in scenes})]
    inputs += [(path.name, path.stat().st_size) for path in places.values()]
    key = json.dumps([_RECIPE, SIZE, count_of, places_of, inputs])
    folder = cache / f"birds-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    if folder.is_dir() and problem(folder) is None:
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f".{folder.name}.lock", lambda: None):
            wrong = problem(folder) if folder.is_dir() else "there are none"
            if wrong is None:  # another process made them in the meantime
                return folder
            if folder.is_dir():
                logger.warning(f"composed images in {folder} are damaged and will be made again: {wrong}")
            remove_dead_parts(cache)
            store_folder(
                folder, lambda part: _compose_all(part, scenes, places, places_of), {"kind": "birds"}
            )
    except OSError as error:
        if problem(folder) is None:  # without locks, another process was faster
            return folder
        raise TrainError(f"cannot write composed images to {cache}: {error.strerror or error}") from error
    return folder


def _compose_all(
    folder: Path,
    scenes: list[_Scene],
    places: dict[str, Path],
    places_of: dict[str, tuple[str, ...]],
) -> None:
    cut_outs = {bird: _cut_out(bird) for bird in {scene.bird for scene in scenes}}
    pictures = {name: read_image(path) for name, path in places.items()}
    boxes = []
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng([_RECIPE, number])
        place = pictures[str(rng.choice(places_of[scene.split]))]
        image, mask = compose(cut_outs[scene.bird], place, rng)
        path = scene.path(folder, ".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=92)
        mask.save(scene.path(folder, ".mask.png"))
        boxes.append(box_of(torch.from_numpy(np.array(mask)) > _OPAQUE))
    (folder / _BOXES).write_text(json.dumps(boxes))


def _cut_out(path: Path) -> Image.Image:
    """The bird without the empty margin around it."""
    try:
        with Image.open(path) as image:
            bird = image.convert("RGBA")
    except OSError as error:
        raise TrainError(f"cannot read image {path}: {error}") from error
    return bird.crop(bird.getchannel("A").getbbox())


def compose(
    bird: Image.Image, place: Image.Image, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """A scene (RGB, SIZE x SIZE) that holds the whole bird (RGBA), and the bird's alpha channel (L) in it."""
    side = int(min(place.size) * rng.uniform(*_CROP))
    x, y = (int(rng.integers(0, length - side + 1)) for length in place.size)
    scene = place.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
    scene = ImageEnhance.Brightness(scene).enhance(rng.uniform(*_LIGHT))

    if rng.random() < 0.5:
        bird = bird.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    bird = bird.rotate(rng.uniform(-_TILT, _TILT), Image.Resampling.BICUBIC, expand=True)
    bird = bird.crop(bird.getchannel("A").getbbox())
    factor = SIZE * rng.uniform(*_LENGTH) / max(bird.size)
    width, height = (max(1, round(factor * length)) for length in bird.size)
    bird = bird.resize((width, height), Image.Resampling.LANCZOS)
    alpha = bird.getchannel("A")
    colours = ImageEnhance.Brightness(bird.convert("RGB")).enhance(rng.uniform(*_LIGHT))
    colours = ImageEnhance.Contrast(colours).enhance(rng.uniform(*_LIGHT))

    corner = int(rng.integers(0, SIZE - width + 1)), int(rng.integers(0, SIZE - height + 1))
    scene.paste(colours, corner, alpha)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(alpha, corner)
    return scene, mask
