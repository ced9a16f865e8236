"""Find files that are not images, before training starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from ggam_fast.training.data.image_set import ImageSet, check_depth
from ggam_fast.training.data.repeats import warn_of_same_content
from ggam_fast.training.errors import TrainError

logger = logging.getLogger(__name__)

# A message names at most this many files.
_NAMED = 5


class Scanned(NamedTuple):
    """The problem of one file, or else its (width, height) as the network sees it."""

    row: int
    problem: str | None
    size: tuple[int, int]


def scan(images: ImageSet, rows: Iterable[int], on_file: Callable[[], None] = lambda: None) -> list[Scanned]:
    """Decode some rows of a data set and report each. JPEGs are decoded at an eighth of their size."""

    def look(row: int) -> Scanned:
        problem, size = _problem(images.files[row])
        on_file()
        return Scanned(row, problem, (size[0], size[1] - images.banner))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(look, rows))


def _problem(path: Path) -> tuple[str | None, tuple[int, int]]:
    try:
        with Image.open(path) as image:
            check_depth(image)
            size = image.size
            image.draft(image.mode, (1, 1))
            image.load()
        return None, size
    except FileNotFoundError:
        return "no such file", (0, 0)
    except UnidentifiedImageError:
        return "not an image file", (0, 0)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error), (0, 0)


def readable(images: ImageSet, crop: int, *, skip_bad: bool, enlarge: bool) -> ImageSet:
    """Check that all `images` can be read and are no smaller than the crop, and return them.

    With `skip_bad`, the set that is returned lacks the images that cannot be read. Splits that the data set
    does not fix are drawn from the rest. Copies of one content in several splits or classes are warned of.

    Raises:
        TrainError: an image cannot be read and `skip_bad` is off, or one is too small and `enlarge` is off.
    """
    found = scan(images, range(len(images.files)))
    for reason in refusals(images, found, crop, skip_bad=skip_bad, enlarge=enlarge):
        raise TrainError(reason)
    bad = unreadable(found)
    if bad:
        names = _list([f"{images.files[one.row]} ({one.problem})" for one in bad])
        images = images.without([one.row for one in bad])
        logger.info(f"left out {_images(len(bad))} that cannot be read: {names}; left: {images.summary()}")
    warn_of_same_content(images)
    return images


def unreadable(found: Iterable[Scanned]) -> list[Scanned]:
    """The files that cannot be read."""
    return [one for one in found if one.problem is not None]


def too_small(found: Iterable[Scanned], crop: int) -> list[Scanned]:
    """The images with a side shorter than the crop."""
    return [one for one in found if one.problem is None and min(one.size) < crop]


def refusals(
    images: ImageSet, found: Sequence[Scanned], crop: int, *, skip_bad: bool, enlarge: bool
) -> list[str]:
    """Why training refuses the images that were `found`, one line for each reason."""
    reasons = []
    bad, small = unreadable(found), too_small(found, crop)
    if bad and not skip_bad:
        names = _list([f"{images.files[one.row]} ({one.problem})" for one in bad])
        reasons.append(f"cannot read {_images(len(bad))}: {names}; --skip-bad-images leaves them out")
    elif bad:
        try:
            images.without([one.row for one in bad])
        except TrainError as error:
            reasons.append(str(error))
    if small and not enlarge:
        least = min(small, key=lambda one: min(one.size))
        reasons.append(
            f"found {_images(len(small))} smaller than the crop of {crop} x {crop}, such as "
            f"{images.files[least.row]} ({least.size[0]} x {least.size[1]}); "
            "enlarge them with --enlarge, or choose a smaller --image-size"
        )
    return reasons


def _images(count: int) -> str:
    return f"{count} image{'s' if count > 1 else ''}"


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
