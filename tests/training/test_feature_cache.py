import os

import pytest
import torch

from ggam_fast.training.data.batches import ImageBatches, MapBatches
from ggam_fast.training.data.image_set import ImageFiles, eval_transform
from ggam_fast.training.data.readers import folder
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.backbones import Backbone, create_backbone
from ggam_fast.training.model.feature_cache import MapFile, default_cache_dir, encoded
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


def map_file(folder, backbone, images, dtype=torch.float32) -> MapFile:
    return MapFile(folder, backbone, backbone.fingerprint(), images, dtype)


def fill(file: MapFile, backbone, images, batch_size=7) -> None:
    file.write(
        encoded(ImageBatches(images, batch_size, CPU, 0).epoch(0), backbone, batch_size, lambda _: None)
    )


def test_cached_maps_are_those_computed_afresh(tmp_path, backbone, images):
    file = map_file(tmp_path / "new" / "cache", backbone, images)
    assert not file.exists()
    fill(file, backbone, images)
    assert map_file(tmp_path / "new" / "cache", backbone, images).exists()
    maps = file.open()
    assert maps.shape == (48, backbone.num_features, *backbone.feat_size)
    assert maps.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for index in (0, 6, 7, 47):  # within, at the end of and after a batch; the padded last one
            fresh = backbone(images[index][0][None])[0]
            torch.testing.assert_close(maps[index], fresh, rtol=1e-5, atol=1e-6)


def test_half_precision_maps(tmp_path, backbone, images):
    file = map_file(tmp_path, backbone, images, torch.bfloat16)
    fill(file, backbone, images)
    with torch.no_grad():
        fresh = backbone(images[5][0][None])[0].bfloat16()
    torch.testing.assert_close(file.open()[5], fresh)


def test_name_depends_on_all_that_decides_the_maps(tmp_path, photos, backbone, images):
    paths = {map_file(tmp_path, backbone, images).path}
    paths.add(map_file(tmp_path, backbone, images, torch.bfloat16).path)
    os.utime(images.items[0][0], (1, 1))
    paths.add(map_file(tmp_path, backbone, images).path)
    images.items = images.items[:-1]
    paths.add(map_file(tmp_path, backbone, images).path)
    with torch.no_grad():
        next(backbone.parameters()).mul_(2)
    paths.add(map_file(tmp_path, backbone, images).path)
    larger = create_backbone("test_resnet", pretrained=False, image_size=96)
    larger.load_state_dict(backbone.state_dict())
    paths.add(map_file(tmp_path, larger, images).path)
    assert len(paths) == 6


def test_failure_leaves_no_file(tmp_path, backbone, images):
    images.items[20][0].write_bytes(b"broken")
    with pytest.raises(TrainError, match="cannot read image"):
        fill(map_file(tmp_path / "cache", backbone, images), backbone, images)
    assert list((tmp_path / "cache").iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path, backbone, images):
    (tmp_path / "file").touch()
    with pytest.raises(TrainError, match="--cache-dir"):
        fill(map_file(tmp_path / "file" / "cache", backbone, images), backbone, images)


def test_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "ggam_fast"


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
