"""Cached maps equal those that the backbone computes."""

import os

import pytest
import torch

from ggam_fast.training.data.batches import ImageBatches
from ggam_fast.training.data.image_set import ImageFiles, eval_transform
from ggam_fast.training.data.readers import folder
from ggam_fast.training.errors import TrainError
from ggam_fast.training.model.backbones import Backbone, create_backbone
from ggam_fast.training.model.feature_cache import MapFile, default_cache_dir, encoded

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
    assert not file.sound()
    fill(file, backbone, images)
    assert map_file(tmp_path / "new" / "cache", backbone, images).sound()
    maps = file.open()
    assert maps.shape == (48, backbone.num_features, *backbone.feat_size)
    assert maps.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for index in (0, 6, 7, 47):  # inside, at the end of and after a batch, and in the padded last batch
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


@pytest.mark.parametrize(
    "damage",
    [
        lambda bits: bytes(len(bits)),
        lambda bits: bits[:1000] + b"\xff\xff" + bits[1002:],
        lambda bits: bits[: len(bits) // 2],
        lambda bits: b"",
    ],
)
def test_damaged_maps_are_told_and_written_again(tmp_path, backbone, images, caplog, damage):
    file = map_file(tmp_path, backbone, images)
    fill(file, backbone, images)
    assert file.sound()
    whole = file.path.read_bytes()
    file.path.write_bytes(damage(whole))
    assert not file.sound()
    assert not file.sound()
    [message] = caplog.messages  # once
    assert f"cached maps {file.path} are damaged" in message
    fill(file, backbone, images)
    assert file.sound()
    assert file.path.read_bytes() == whole


def test_maps_of_other_images_are_not_taken(tmp_path, backbone, images):
    """A whole file under another file's name, such as one that was copied there."""
    file = map_file(tmp_path, backbone, images)
    fill(file, backbone, images)
    images.items = images.items[:-1]
    fewer = map_file(tmp_path, backbone, images)
    fewer.path.write_bytes(file.path.read_bytes())
    assert not fewer.sound()
