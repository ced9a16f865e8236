"""The processes of one run, as torchrun starts them. Most runs have one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class World:
    """The processes of a run. `size`: how many there are. `rank`: the number of this one."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, the only one that prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes reach this point."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The `value` of process 0, in every process."""
        return self.gather(value)[0]

    def wrap(self, module: Any, device: torch.device) -> Any:
        """`module` with its gradients averaged over the processes."""
        if self.size == 1:
            return module
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun describes in environment variables, or `ALONE` without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def local_device() -> str:
    """The GPU of this process under torchrun."""
    return f"cuda:{os.environ['LOCAL_RANK']}"
