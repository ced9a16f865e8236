"""Batches on the training device, of images or of cached feature maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ggam_fast.training.data import ImageFiles
from ggam_fast.training.errors import TrainError

# Maps are kept on the GPU if they take less than this share of its free memory.
_RESIDENT_SHARE = 0.5


class Batches(Protocol):
    """Yields inputs (n, ...) and labels (n,); one iteration is one pass."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def example(self) -> tuple[Tensor, Tensor]:
        """A whole batch, the same every time; what iterations yield does not change."""
        ...


class MapBatches:
    """Feature maps (N, C, H, W) in order; with `shuffle_seed`, shuffled anew in every pass and
    without the last partial batch."""

    def __init__(
        self,
        maps: Tensor,
        labels: Tensor,
        batch_size: int,
        device: torch.device,
        shuffle_seed: int | None = None,
    ) -> None:
        if device.type == "cuda" and maps.nbytes < _RESIDENT_SHARE * _free_memory(device):
            maps = maps.to(device)
        # Rows of this view are contiguous, so that indexing copies whole rows.
        self._rows = maps.permute(0, 2, 3, 1)
        self._labels = labels.to(maps.device)
        self._batch_size = batch_size
        self._device = device
        self._generator = None if shuffle_seed is None else torch.Generator().manual_seed(shuffle_seed)

    def __len__(self) -> int:
        count, size = len(self._labels), self._batch_size
        return count // size if self._generator else -(-count // size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self._labels)
        order = torch.randperm(count, generator=self._generator) if self._generator else torch.arange(count)
        for chosen in order.split(self._batch_size)[: len(self)]:
            yield self._batch(chosen.to(self._labels.device))

    def example(self) -> tuple[Tensor, Tensor]:
        return self._batch(torch.arange(self._batch_size, device=self._labels.device))

    def _batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        maps = self._rows[chosen].permute(0, 3, 1, 2)
        return maps.to(self._device), self._labels[chosen].to(self._device)


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


class ImageBatches:
    """Images (N, 3, size, size) in channels-last memory, decoded as they are needed; with
    `shuffle_seed`, shuffled anew in every pass and without the last partial batch."""

    def __init__(
        self,
        images: ImageFiles,
        batch_size: int,
        device: torch.device,
        workers: int,
        shuffle_seed: int | None = None,
    ) -> None:
        shuffle = shuffle_seed is not None
        self._images = images
        self._batch_size = batch_size
        self._device = device
        self._loader: DataLoader[tuple[Tensor, int]] = DataLoader(
            images,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=workers,
            persistent_workers=workers > 0 and shuffle,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_interrupts_to_parent,
            generator=torch.Generator().manual_seed(shuffle_seed or 0),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for images, labels in self._loader:
                yield self._on_device(images, labels)
        except TrainError as error:
            # A worker process hands its error over as the text of a traceback.
            last = str(error).splitlines()[-1]
            raise TrainError(last.removeprefix(f"{_ERROR}: ")) from error

    def example(self) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng():
            items = [self._images[index] for index in range(self._batch_size)]
        images, labels = zip(*items, strict=True)
        return self._on_device(torch.stack(images), torch.tensor(labels))

    def _on_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self._device, non_blocking=True)
        return (
            images.contiguous(memory_format=torch.channels_last),
            labels.to(self._device, non_blocking=True),
        )


_ERROR = f"{TrainError.__module__}.{TrainError.__qualname__}"


def _leave_interrupts_to_parent(_worker: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
