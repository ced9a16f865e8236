"""Images that lie in a data set twice: as one file, or as files of the same content."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ggam_fast.training.data.image_set import ImageSet
from ggam_fast.training.errors import TrainError

logger = logging.getLogger(__name__)


def refuse_one_file_twice(images: ImageSet) -> None:
    """Raise a `TrainError` if a file, links followed, is in two splits or has two classes."""
    keys: list[Hashable] = []
    for path in images.files:
        try:
            status = path.stat()
        except OSError:
            keys.append(None)  # it cannot be read, which is found later
        else:
            keys.append((status.st_dev, status.st_ino))
    splits = _split_of_row(images)
    for rows in _groups(range(len(keys)), keys):
        first = rows[0]
        for row in rows[1:]:
            both = f"{images.files[first]} and {images.files[row]}"
            if splits.get(first) != splits.get(row):
                raise TrainError(
                    f"{both} are one file, which is in the {splits.get(first)} split and in the "
                    f"{splits.get(row)} split; an image must be in one split alone"
                )
            if images.labels[first] != images.labels[row]:
                raise TrainError(f"{both} are one file, so it would have two classes")


class Copies(NamedTuple):
    """Rows of files with equal content: those in different splits, and those of different classes."""

    across_splits: list[list[int]]
    across_classes: list[list[int]]


def copies(images: ImageSet) -> Copies:
    """The copies among the images. Only files of equal size are read."""
    splits = _split_of_row(images)
    groups = _same_content(images)
    return Copies(
        [rows for rows in groups if len({splits.get(row) for row in rows}) > 1],
        [rows for rows in groups if len(set(images.labels[rows].tolist())) > 1],
    )


def warn_of_same_content(images: ImageSet) -> None:
    """Log how many images of one content lie in different splits, or have different classes."""
    found = copies(images)
    for what, groups in (("splits", found.across_splits), ("classes", found.across_classes)):
        if groups:
            some = " and ".join(str(images.files[row]) for row in groups[0][:2])
            logger.warning(f"images of the same content in several {what}: {len(groups)}, such as {some}")


def _same_content(images: ImageSet) -> list[list[int]]:
    """Rows of files with equal content, one list for each content."""
    sizes: list[Hashable] = [path.stat().st_size if path.is_file() else None for path in images.files]
    alike = [row for rows in _groups(range(len(sizes)), sizes) for row in rows]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(_digest, (images.files[row] for row in alike)))
    return _groups(alike, digests)


def _digest(path: Path) -> bytes | None:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:  # it cannot be read, which is told elsewhere
        return None


def _groups(rows: Iterable[int], keys: Iterable[Hashable]) -> list[list[int]]:
    """The rows that share a key with another row, one list for each key. Rows without a key are left out."""
    groups = defaultdict(list)
    for row, key in zip(rows, keys, strict=True):
        if key is not None:
            groups[key].append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def _split_of_row(images: ImageSet) -> dict[int, str]:
    return {row: name for name, rows in images.splits.items() for row in rows.tolist()}
