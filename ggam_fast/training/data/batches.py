"""Batches on the training device, of images or of cached feature maps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ggam_fast.training.data.image_set import ImageFiles
from ggam_fast.training.errors import TrainError
from ggam_fast.training.system.distributed import ALONE, World

# Maps stay on the GPU if they take less than this share of its free memory.
_RESIDENT_SHARE = 0.5


class Order:
    """The rows of each batch.

    With a `seed`, rows are shuffled and the last partial batch is left out. The order depends only on seed
    and epoch, so a run can continue in the middle of an epoch. Every process of `world` gets its own batches.
    With `weights` (N,), rows are drawn by their weights instead, with replacement. Without a seed, process p
    gets the rows r with r % world.size == p.

    Raises:
        TrainError: rows are shuffled, and they do not suffice for one batch in every process.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int | None,
        world: World = ALONE,
        weights: Tensor | None = None,
    ) -> None:
        if seed is not None and count < batch_size * world.size:
            raise TrainError(
                f"--batch-size must be at most {count // world.size} for {count} training images on "
                f"{world.size} processes"
            )
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.weights = weights

    def __len__(self) -> int:
        if self.seed is None:
            return -(-len(range(self.world.rank, self.count, self.world.size)) // self.batch_size)
        return self.count // (self.batch_size * self.world.size)

    def batches(self, epoch: int) -> list[Tensor]:
        """The rows (int64) of each batch of one epoch."""
        if self.seed is None:
            rows = torch.arange(self.world.rank, self.count, self.world.size)
            return list(rows.split(self.batch_size))
        generator = torch.Generator().manual_seed(_seed(self.seed, epoch))
        if self.weights is None:
            rows = torch.randperm(self.count, generator=generator)
        else:
            rows = torch.multinomial(self.weights, self.count, replacement=True, generator=generator)
        return list(rows.split(self.batch_size))[self.world.rank :: self.world.size][: len(self)]


def _seed(*numbers: int) -> int:
    return hash(numbers) & (2**63 - 1)


class Batches(Protocol):
    """Yields inputs (n, ...) and labels (n,)."""

    order: Order

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass, from batch `start` on. The same epoch always gives the same batches."""
        ...

    def example(self) -> tuple[Tensor, Tensor]:
        """A whole batch. This call does not change the batches of later epochs."""
        ...


class MapBatches:
    """Batches of maps (N, C, H, W) or tokens (N, L, C), in order.

    With `shuffle_seed` they are shuffled in every epoch, and the last partial batch is left out.
    """

    def __init__(
        self,
        maps: Tensor,
        labels: Tensor,
        batch_size: int,
        device: torch.device,
        shuffle_seed: int | None = None,
        world: World = ALONE,
        weights: Tensor | None = None,
    ) -> None:
        if device.type == "cuda" and maps.nbytes < _RESIDENT_SHARE * _free_memory(device):
            maps = maps.to(device)
        # Rows of this view are contiguous, so indexing copies whole rows.
        self._rows = maps.permute(0, 2, 3, 1) if maps.ndim == 4 else maps
        self._labels = labels.to(maps.device)
        self._device = device
        self.order = Order(len(labels), batch_size, shuffle_seed, world, weights)

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in self.order.batches(number)[start:]:
            yield self._batch(chosen.to(self._labels.device))

    def example(self) -> tuple[Tensor, Tensor]:
        return self._batch(torch.arange(self.order.batch_size, device=self._labels.device))

    def _batch(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        maps = self._rows[chosen]
        maps = maps.permute(0, 3, 1, 2) if maps.ndim == 4 else maps
        return maps.to(self._device), self._labels[chosen].to(self._device)


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


class ImageBatches:
    """Batches of images (N, 3, size, size) in channels-last memory, decoded as they are needed.

    With `shuffle_seed` they are shuffled in every epoch, and the last partial batch is left out. Random
    augmentation of an image depends on seed, epoch and row, and not on the number of workers. Of rows that
    are drawn several times it depends on their places in the epoch too.
    """

    def __init__(
        self,
        images: ImageFiles,
        batch_size: int,
        device: torch.device,
        workers: int,
        shuffle_seed: int | None = None,
        world: World = ALONE,
        weights: Tensor | None = None,
    ) -> None:
        self.order = Order(len(images), batch_size, shuffle_seed, world, weights)
        self._images = _Seeded(images, shuffle_seed)
        self._device = device
        self._sampler = _EpochSampler(self.order)
        self._loader: DataLoader[tuple[Tensor, int]] = DataLoader(
            self._images,
            batch_sampler=self._sampler,
            num_workers=workers,
            persistent_workers=workers > 0 and shuffle_seed is not None,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_interrupts_to_parent,
            # The loader gets its own generator. Otherwise every epoch would draw from the global one.
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self._sampler.number, self._sampler.start = number, start
        try:
            for images, labels in self._loader:
                yield self._on_device(images, labels)
        except TrainError as error:
            # A worker process reports its error as the text of a traceback.
            last = str(error).splitlines()[-1]
            raise TrainError(last.removeprefix(f"{_ERROR}: ")) from error

    def example(self) -> tuple[Tensor, Tensor]:
        items = [self._images[0, row, 0] for row in range(self.order.batch_size)]
        images, labels = zip(*items, strict=True)
        return self._on_device(torch.stack(images), torch.tensor(labels))

    def _on_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self._device, non_blocking=True)
        return (
            images.contiguous(memory_format=torch.channels_last),
            labels.to(self._device, non_blocking=True),
        )


class _Seeded(Dataset[tuple[Tensor, int]]):
    """`images[epoch, row, place]`. With a seed, the random state depends on these and on nothing else."""

    def __init__(self, images: ImageFiles, seed: int | None) -> None:
        self._images = images
        self._seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        epoch, row, place = key
        if self._seed is None:
            return self._images[row]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(self._seed, epoch, row, *([place] if place else [])))
            return self._images[row]


class _EpochSampler:
    def __init__(self, order: Order) -> None:
        self._order = order
        self.number = 0
        self.start = 0

    def __len__(self) -> int:
        return len(self._order) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        """Epoch, row and place of each image. The place is 0 if a row is drawn once."""
        order = self._order
        for index, rows in enumerate(order.batches(self.number)):
            first = (index * order.world.size + order.world.rank) * order.batch_size
            if index >= self.start:
                yield [
                    (self.number, row, 0 if order.weights is None else first + place)
                    for place, row in enumerate(rows.tolist())
                ]


_ERROR = f"{TrainError.__module__}.{TrainError.__qualname__}"


def leave_interrupts_to_parent(worker: int) -> None:
    """Let the decoding process number `worker` ignore Ctrl-C, and SIGTERM unless its parent sends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
