"""Batches are a function of seed and epoch, and processes share them."""

import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch

from ggam_fast.training.data.batches import (
    ImageBatches,
    MapBatches,
    Order,
    _Seeded,
    leave_interrupts_to_parent,
)
from ggam_fast.training.data.image_set import ImageFiles, eval_transform
from ggam_fast.training.data.readers import folder
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.backbones import Backbone, create_backbone
from ggam_fast.training.system.distributed import World

CPU = torch.device("cpu")


@pytest.fixture
def backbone() -> Backbone:
    torch.manual_seed(0)
    return create_backbone("test_resnet", pretrained=False, image_size=64).eval()


@pytest.fixture
def images(photos, backbone) -> ImageFiles:
    look = eval_transform(64, backbone.mean, backbone.std)
    found = folder.read(photos, photos)
    return ImageFiles(found, "train", look, found.flips)


def test_error_in_a_worker_process_is_one_line(images):
    images.items[3][0].write_bytes(b"broken")
    with pytest.raises(TrainError, match="cannot read image") as raised:
        list(ImageBatches(images, 8, CPU, workers=1).epoch(0))
    assert "\n" not in str(raised.value)


def test_shuffled_batches_are_whole_and_repeatable():
    maps = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 2, 3, 3)
    maps = maps.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(10)

    def two_passes(seed):
        batches = MapBatches(maps, labels, 4, CPU, shuffle_seed=seed)
        assert len(batches) == 2
        return [target.tolist() for epoch in (1, 2) for _, target in batches.epoch(epoch)]

    passes = two_passes(1)
    assert [len(batch) for batch in passes] == [4] * 4
    assert passes[:2] != passes[2:]
    assert passes == two_passes(1)
    assert passes != two_passes(2)
    for inputs, target in MapBatches(maps, labels, 4, CPU, shuffle_seed=1).epoch(1):
        assert inputs[:, 1, 2, 2].tolist() == target.tolist()
        assert inputs.is_contiguous(memory_format=torch.channels_last)


def test_batches_in_order_hold_every_row_once():
    maps = torch.randn(10, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    batches = MapBatches(maps, torch.arange(10), 4, CPU)
    assert len(batches) == 3
    assert torch.cat([inputs for inputs, _ in batches.epoch(0)]).equal(maps)


def test_an_epoch_can_be_begun_in_the_middle_and_shared_between_processes():
    maps = torch.arange(22.0).view(22, 1, 1, 1).expand(22, 2, 3, 3)
    maps = maps.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(22)
    whole = [target.tolist() for _, target in MapBatches(maps, labels, 3, CPU, 5).epoch(2)]
    later = [target.tolist() for _, target in MapBatches(maps, labels, 3, CPU, 5).epoch(2, start=4)]
    assert later == whole[4:]
    shares = [
        [target.tolist() for _, target in MapBatches(maps, labels, 3, CPU, 5, World(rank, 2)).epoch(2)]
        for rank in (0, 1)
    ]
    assert [len(share) for share in shares] == [3, 3]
    assert shares[0] == whole[0:6:2]
    assert shares[1] == whole[1:6:2]


def test_augmentation_depends_on_seed_epoch_and_row_alone(images):
    noisy = replace_transform(images, lambda image: torch.rand(3, 4, 4))

    def rows(workers, seed, epoch):
        return torch.cat([x for x, _ in ImageBatches(noisy, 8, CPU, workers, seed).epoch(epoch)])

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = rows(0, 1, 1)
    assert torch.get_rng_state().equal(before)
    torch.rand(5)
    assert rows(0, 1, 1).equal(first)
    assert rows(2, 1, 1).equal(first)
    assert not rows(0, 1, 2).equal(first)
    assert not rows(0, 2, 1).equal(first)


def replace_transform(images, transform):
    images.transform = transform
    return images


def test_batches_of_all_processes_larger_than_the_split_are_refused():
    assert len(Order(16, 8, 0, World(1, 2))) == 1
    assert len(Order(16, 9, None, World(1, 2))) == 1
    with pytest.raises(TrainError, match=r"--batch-size must be at most 8 for 16 .* on 2 processes"):
        Order(16, 9, 0, World(1, 2))


def test_rows_are_drawn_by_their_weights():
    weights = torch.tensor([1.0] * 90 + [9.0] * 10)
    whole = Order(100, 5, 3, weights=weights)
    rows = torch.cat([row for epoch in range(1, 21) for row in whole.batches(epoch)])
    assert len(rows) == 20 * 100
    assert 0.45 < (rows >= 90).float().mean() < 0.55
    assert torch.cat(whole.batches(1)).equal(torch.cat(Order(100, 5, 3, weights=weights).batches(1)))
    assert not torch.cat(whole.batches(1)).equal(torch.cat(whole.batches(2)))
    shares = [Order(100, 5, 3, World(rank, 2), weights).batches(1) for rank in (0, 1)]
    assert torch.cat([row for pair in zip(*shares, strict=True) for row in pair]).equal(
        torch.cat(whole.batches(1))
    )


def test_a_row_that_is_drawn_twice_is_augmented_in_two_ways(images):
    noisy = replace_transform(images, lambda image: torch.rand(3, 4, 4))
    weights = torch.zeros(len(images))
    weights[:2] = 1

    def drawn(workers, start=0):
        return torch.cat(
            [x for x, _ in ImageBatches(noisy, 8, CPU, workers, 1, weights=weights).epoch(1, start)]
        )

    first = drawn(0)
    assert len(first.flatten(1).unique(dim=0)) == len(first) == 48
    assert drawn(1).equal(first)
    assert drawn(0, start=2).equal(first[16:])


@pytest.mark.parametrize("seed", [None, 3])
def test_processes_share_the_rows_of_an_epoch(seed):
    parts = [Order(24, 4, seed, World(rank, 3)).batches(5) for rank in range(3)]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert sorted(torch.cat([torch.cat(part) for part in parts]).tolist()) == list(range(24))


def test_augmentation_is_that_of_seed_epoch_and_row():
    class Noise:
        def __getitem__(self, row):
            return torch.rand(4), row

    def drawn(seed, epoch, row, place=0):
        return _Seeded(Noise(), seed)[epoch, row, place][0]

    before = torch.get_rng_state()
    first = drawn(0, 1, 2)
    assert torch.get_rng_state().equal(before)
    assert drawn(0, 1, 2).equal(first)
    assert not any(drawn(*other).equal(first) for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 1, 2, 7)))


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGTERM from the parent"])
def test_a_decoding_process_obeys_its_parent_alone(sent):
    number = getattr(signal, sent.split()[0])
    ready, worker_ready = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_decoding, args=(worker_ready,))
    process.start()
    try:
        assert ready.recv() == "ready"
        if sent.endswith("parent"):
            os.kill(process.pid, number)
            process.join(60)
            assert process.exitcode == 0
        else:
            subprocess.run(["kill", f"-{number.value}", str(process.pid)], check=True)
            process.join(0.5)
            assert process.is_alive()
    finally:
        process.kill()


def _decoding(pipe) -> None:
    leave_interrupts_to_parent(0)
    pipe.send("ready")
    time.sleep(300)
