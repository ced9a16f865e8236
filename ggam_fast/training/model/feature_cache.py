"""Maps of a frozen backbone, or of its frozen first layers. They are computed once and then memory-mapped."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from ggam_fast.training.data.image_set import ImageFiles
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.backbones import Backbone
from ggam_fast.training.model.cut import FirstLayers
from ggam_fast.training.system import cache

logger = logging.getLogger(__name__)

_FORMAT = 2
"""Version of the files of maps."""

_DECODING = 2
"""Version of `image_set.read_image`. It changes when that function reads other pixels from a file."""


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/ggam_fast`, or `~/.cache/ggam_fast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ggam_fast"


class MapFile:
    """The maps of `backbone`, whose fingerprint is `weights`, on the images of `dataset`.

    The file's name is a hash of everything that decides its content: path, size, time of change and
    mirroring of every image, the weights, the preprocessing, the dtype and the version of torch. It also
    covers whether smaller images were allowed, because stored maps are not checked again. A checksum is
    stored behind the maps.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Backbone | FirstLayers,
        weights: str,
        dataset: ImageFiles,
        dtype: torch.dtype,
        enlarge: bool = False,
    ) -> None:
        files = []
        for path, flip in dataset.items:
            try:
                status = path.stat()
            except OSError as error:
                raise TrainError(f"cannot read image {path}: {error.strerror}") from error
            files.append((str(path), status.st_size, status.st_mtime_ns, flip))
        key = {
            "files": files,
            "weights": weights,
            "preprocessing": (*backbone.preprocessing, dataset.banner),
            "dtype": str(dtype),
            "torch": torch.__version__,
            "enlarge": enlarge,
            "decoding": _DECODING,
            "format": _FORMAT,
        }
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self.path = folder / f"{backbone.name}-{backbone.image_size}-{digest[:20]}.maps"
        self.dtype = dtype
        self._shape = (len(dataset), *_stored(torch.empty(1, *backbone.map_shape, device="meta")).shape[1:])
        self._kind = backbone.kind
        self.nbytes = math.prod(self._shape) * dtype.itemsize
        self._images = os.path.commonpath([path.parent.absolute() for path, _ in dataset.items])
        self._looked_at: tuple[int, int, int] | None = None
        self._sound = False

    def sound(self) -> bool:
        """Whether the maps are there and have their checksum. This reads the file, if it has changed."""
        try:
            status = self.path.stat()
        except OSError:
            return False
        state = status.st_ino, status.st_size, status.st_mtime_ns
        if state != self._looked_at:
            wrong = cache.problem(self.path)
            stored = cache.about(self.path)
            if wrong is None and stored is not None and stored["bytes"] != self.nbytes:
                wrong = f"it holds {stored['bytes']} bytes and not {self.nbytes}"
            if wrong is not None:
                logger.warning(f"cached maps {self.path} are damaged and will be computed again: {wrong}")
            self._looked_at, self._sound = state, wrong is None
        return self._sound

    def open(self) -> Tensor:
        """The maps, mapped from the file. Maps (N, C, H, W) are in channels-last memory.

        `sound` checks them before.

        Raises:
            TrainError: the file cannot be read.
        """
        try:
            flat = torch.from_file(str(self.path), size=math.prod(self._shape), dtype=self.dtype)
        except RuntimeError as error:
            raise TrainError(f"cannot read feature maps {self.path}: {error}") from error
        with suppress(OSError):  # another user's file
            os.utime(self.path)  # `ggam-fast cache` tells by it when the maps were used last
        stored = flat.view(self._shape)
        return stored.permute(0, 3, 1, 2) if stored.ndim == 4 else stored

    def write(self, batches: Iterable[Tensor]) -> None:
        """Store batches of maps (n, ...) one after the other. If a batch fails, no file is left.

        Raises:
            TrainError: the folder cannot be made or written.
        """
        folder = self.path.parent
        about = {
            "kind": self._kind,
            "backbone": self.path.name.rsplit("-", 2)[0],
            "images": self._images,
            "shape": self._shape,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

        def rows() -> Iterator[memoryview]:
            for maps in batches:
                flat = _stored(maps).to(self.dtype).contiguous().view(-1).view(torch.uint8)
                yield flat.numpy().data

        try:
            folder.mkdir(parents=True, exist_ok=True)
            cache.store_file(self.path, rows(), about)
        except OSError as error:
            reason = error.strerror or error
            raise TrainError(
                f"cannot write feature maps to {folder}: {reason}; choose another --cache-dir"
            ) from error


def _stored(maps: Tensor) -> Tensor:
    """`maps` in the order of the file. The first dimension behind N moves to the end, but not for tokens."""
    return maps.permute(0, 2, 3, 1) if maps.ndim == 4 else maps


def encoded(
    batches: Iterable[tuple[Tensor, Tensor]],
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    on_batch: Callable[[int], None],
) -> Iterable[Tensor]:
    """`encode` of each batch of images, on the CPU.

    All calls get `batch_size` images, so a compiled `encode` sees one shape. Blank images fill up the last
    batch.
    """
    for images, _ in batches:
        count = len(images)
        blanks = images.new_zeros(batch_size - count, *images.shape[1:])
        padded = torch.cat([images, blanks]) if count < batch_size else images
        with torch.no_grad():
            yield encode(padded)[:count].cpu()
        on_batch(count)
