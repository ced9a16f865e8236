"""Which files below a folder are images of a data set, and what is left out.

All readers that search a folder search it here.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS  # type: ignore[import-untyped]

from ggam_fast.training.errors import TrainError

_SYSTEM = frozenset(
    {
        *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *("@eadir", "@recycle", "#recycle", "#snapshot", "lost+found"),
    }
)
# Types that need a package or a decision (which frame, which exposure), so they are named and not read.
_NO_PLUGIN = frozenset({".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".raw", ".exr"})

Identity = tuple[int, int]
Read = dict[Identity, tuple[str, Path]]
"""What is read already: the class and the path of each file or folder."""


class LeftOut:
    """The files and folders that are not read, by the reason."""

    HIDDEN = "hidden or system files and folders"
    CLOSED = "folders that cannot be opened"
    LINKS = "links to what is read already, or to a folder above them"
    TYPES = "images of types that are not read"
    OTHERS = "files whose names are not those of images"
    BESIDE = "images beside the class folders"
    FOLDERS = "folders beside the splits"

    def __init__(self) -> None:
        self._paths: defaultdict[str, list[Path]] = defaultdict(list)

    def add(self, reason: str, path: Path) -> None:
        self._paths[reason].append(path)

    def first_below(self, folder: Path) -> Path | None:
        """The first path that was left out of `folder`."""
        return min(
            (path for paths in self._paths.values() for path in paths if folder in path.parents), default=None
        )

    def notes(self) -> list[str]:
        """A line for each reason, with the number of paths and the first of them."""
        lines = []
        for reason, paths in sorted(self._paths.items()):
            kinds = Counter(path.suffix.lower() for path in paths)
            types = ", ".join(f"{count} {suffix}" for suffix, count in sorted(kinds.items()))
            detail = f" ({types})" if reason == self.TYPES else ""
            lines.append(f"left out {reason}: {len(paths)}{detail}, such as {min(paths)}")
        return lines


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or belongs to an operating system or an archive."""
    return name.startswith(".") or name.casefold() in _SYSTEM


def is_image(name: str) -> bool:
    """Whether a file is an image by its name, of a type that is read."""
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in IMG_EXTENSIONS


def subfolders(folder: Path, left_out: LeftOut | None = None) -> list[Path]:
    """The folders in `folder` in the order of their names, links included, hidden ones left out.

    Raises:
        TrainError: the folder cannot be opened.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise TrainError(f"{folder} cannot be opened: {error.strerror}") from error
    found = []
    for entry in entries:
        if is_hidden(entry.name):
            if left_out is not None:
                left_out.add(LeftOut.HIDDEN, Path(entry.path))
        elif Path(entry.path).is_dir():
            found.append(Path(entry.path))
        elif left_out is not None:
            _sort_out(Path(entry.path), left_out, LeftOut.BESIDE)
    return found


def images_of_classes(root: Path, left_out: LeftOut) -> dict[str, list[Path]]:
    """The images below each class folder of `root`, by the folder's name.

    Hidden and system names are left out. A link is followed unless it leads to what is read without it, or
    to a folder above it. So no image is read twice, and a circle of links ends.

    Raises:
        TrainError: there is no class folder, one has no image, a folder or an image has two classes, or the
            class folders are splits or lie one level too high.
    """
    folders = {path.name: path for path in subfolders(root, left_out)}
    for name in folders:
        if name != name.encode(errors="replace").decode():
            raise TrainError(f"{root} holds the class {name!r}; names must be UTF-8")
    read: Read = {identity(root): ("", root)}
    for name, folder in list(folders.items()):
        if folder.is_symlink() and _leads_up(folder):
            left_out.add(LeftOut.LINKS, folders.pop(name))
            continue
        its_class, other = read.setdefault(identity(folder), (name, folder))
        if its_class != name:
            raise TrainError(f"{other} and {folder} are one folder, so its images would have two classes")
    if not folders:
        raise TrainError(f"{root} has no class folders, so there are no classes")
    found, inside = _walk(folders, read, left_out)
    _check_level(root, found, inside)
    for name, images in found.items():
        if not images:
            strange = left_out.first_below(folders[name])
            raise TrainError(
                f"{folders[name]} is empty: it holds no images ({', '.join(sorted(IMG_EXTENSIONS))})"
                + (f", only files such as {strange}" if strange else "")
            )
    return found


def images_below(folder: Path, left_out: LeftOut) -> list[Path]:
    """The images in a folder and below it, by the same rule, in the order of their folders and names."""
    found, _ = _walk({"": folder}, {identity(folder): ("", folder)}, left_out)
    return found[""]


def _walk(
    folders: dict[str, Path], read: Read, left_out: LeftOut
) -> tuple[dict[str, list[Path]], dict[str, set[str]]]:
    """The images below each folder, and the names of the folders in it. `read`: what is read already."""
    found: dict[str, list[Path]] = {name: [] for name in folders}
    inside: dict[str, set[str]] = {name: set() for name in folders}
    class_of: Read = {}
    waiting = deque(folders.items())
    # Links come last, so a folder is read where it is, and not where a link leads to it.
    links: deque[tuple[str, Path]] = deque()
    while waiting or links:
        if not waiting:
            name, link = links.popleft()
            if _leads_up(link) or read.setdefault(identity(link), (name, link))[1] is not link:
                left_out.add(LeftOut.LINKS, link)
                continue
            waiting.append((name, link))
        name, folder = waiting.popleft()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            left_out.add(LeftOut.CLOSED, folder)
            continue
        for entry in entries:
            path = Path(entry.path)
            if is_hidden(entry.name):
                left_out.add(LeftOut.HIDDEN, path)
            elif path.is_dir():
                if folder == folders[name]:
                    inside[name].add(entry.name)
                if entry.is_symlink():
                    links.append((name, path))
                elif _is_new(path, name, read):
                    waiting.append((name, path))
                else:
                    left_out.add(LeftOut.LINKS, path)
            elif not is_image(entry.name):
                _sort_out(path, left_out)
            elif _is_new(path, name, class_of):
                found[name].append(path)
            else:
                left_out.add(LeftOut.LINKS, path)
    for images in found.values():
        images.sort(key=lambda path: (str(path.parent), path.name))
    return found, inside


def _is_new(path: Path, name: str, read: Read) -> bool:
    """Whether a file or folder is not read yet. A link that leads nowhere is an image that cannot be read.

    Raises:
        TrainError: it is in another class too.
    """
    try:
        its_class, other = read.setdefault(identity(path), (name, path))
    except OSError:
        return True
    if its_class != name:
        raise TrainError(f"{other} and {path} are one {_kind(path)}, so it would have two classes")
    return other is path


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "file"


def _check_level(root: Path, found: dict[str, list[Path]], inside: dict[str, set[str]]) -> None:
    """Raise if the class folders are splits, or if the class folders lie one level down."""
    names = sorted(found)
    shared = set.intersection(*inside.values())
    directly = any(path.parent == root / name for name, paths in found.items() for path in paths)
    if len(names) == 1:
        below = inside[names[0]]
        if len(below) > 1 and not directly:
            raise TrainError(
                f"{root} has the one class folder {names[0]}, which holds {_some(below)}; "
                f"if these are classes or splits, --root must be {root / names[0]}"
            )
        return
    if directly or any(below != shared for below in inside.values()):
        return
    # One folder of the same name in each class, such as images/, is common and no sign of a mistake.
    if len(shared) > 1 or any(split_of(name) for name in shared):
        raise TrainError(
            f"{root} holds {_some(names)}, and each of them holds {_some(shared)}, so these look like splits "
            "or data sets and not like classes; --root must hold one folder for each class, or train/ and "
            "test/ with such folders"
        )


_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def split_of(name: str) -> str | None:
    """The split that a folder's name means: "train", "val", "test" or none. `Training_set` means "train"."""
    plain = "".join(letter for letter in name.casefold() if letter.isalnum()).removesuffix("set")
    return next((split for split, names in _SPLITS.items() if plain in names), None)


def _sort_out(path: Path, left_out: LeftOut, images: str = "") -> None:
    suffix = path.suffix.lower()
    Image.init()
    if suffix in IMG_EXTENSIONS:
        left_out.add(images, path)
    elif suffix in _NO_PLUGIN or suffix in _pictures():
        left_out.add(LeftOut.TYPES, path)
    else:
        left_out.add(LeftOut.OTHERS, path)


def _pictures() -> set[str]:
    """Suffixes of the images that Pillow opens. Of documents and films it reads pictures too."""
    return {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in ("MPEG", "PDF", "HDF5", "GRIB", "BUFR", "WMF", "EPS")
    }


def identity(path: Path) -> Identity:
    """What tells whether two paths, links followed, are one file or folder."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _leads_up(link: Path) -> bool:
    """Whether a link leads to a folder that holds it."""
    target, place = link.resolve(), link.parent.resolve()
    return target == place or target in place.parents


def _some(names: Iterable[str], most: int = 4) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(f"{name}/" for name in ordered[:most]) + more
