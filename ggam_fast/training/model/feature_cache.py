"""Feature maps of a frozen backbone. They are computed once and then memory-mapped."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ggam_fast.training.data.image_set import ImageFiles
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.backbones import Backbone

_DECODING = 2
"""Version of `image_set.read_image`. It changes when that function reads other pixels from a file."""


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/ggam_fast`, or `~/.cache/ggam_fast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ggam_fast"


class MapFile:
    """The maps of `backbone`, whose fingerprint is `weights`, on the images of `dataset`.

    The file's name is a hash of everything that decides its content: path, size, time of change and
    mirroring of every image, the weights, the preprocessing, the dtype and the version of torch. It also
    covers whether smaller images were allowed, because stored maps are not checked again.
    """

    def __init__(
        self,
        folder: Path,
        backbone: Backbone,
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
        }
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self.path = folder / f"{backbone.name}-{backbone.image_size}-{digest[:20]}.maps"
        self.dtype = dtype
        self._shape = (len(dataset), *backbone.feat_size, backbone.num_features)

        self.nbytes = math.prod(self._shape) * dtype.itemsize

    def exists(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.nbytes

    def open(self) -> Tensor:
        """Maps (N, C, H, W) in channels-last memory, mapped from the file.

        Raises:
            TrainError: the file cannot be read.
        """
        try:
            flat = torch.from_file(str(self.path), size=math.prod(self._shape), dtype=self.dtype)
        except RuntimeError as error:
            raise TrainError(f"cannot read feature maps {self.path}: {error}") from error
        return flat.view(self._shape).permute(0, 3, 1, 2)

    def write(self, batches: Iterable[Tensor]) -> None:
        """Store batches of maps (n, C, H, W) one after the other. If a batch fails, no file is left.

        Raises:
            TrainError: the folder cannot be made or written.
        """
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # tempfile is not used, because only one user can read its files.
            part = folder / f"{self.path.name}.{os.getpid()}.part"
            with part.open("wb") as file:
                try:
                    for maps in batches:
                        rows = maps.permute(0, 2, 3, 1).to(self.dtype).contiguous()
                        file.write(rows.view(torch.uint8).numpy().data)
                    file.close()
                    part.replace(self.path)
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise TrainError(
                f"cannot write feature maps to {folder}: {reason}; choose another --cache-dir"
            ) from error


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
