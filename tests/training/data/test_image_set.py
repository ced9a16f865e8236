"""Image sets: reading, transforming, leaving rows out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ggam_fast.training.data.image_set import ImageFiles, eval_transform, read_image, train_transform
from ggam_fast.training.data.readers import folder
from ggam_fast.training.data.scan import scan
from ggam_fast.training.errors import TrainError


def test_set_without_some_rows(photos, tmp_path):
    from ggam_fast.training.data.readers import read_images

    images = replace(read_images("folder", photos, tmp_path), draw=None)
    rest = images.without([0, 5, 29])
    assert len(rest.files) == 27
    for split, part in rest.splits.items():
        before = {images.files[row] for row in images.splits[split].tolist()}
        gone = {images.files[row] for row in (0, 5, 29)}
        assert {rest.files[row] for row in part.tolist()} == before - gone
    label = dict(zip(images.files, images.labels.tolist(), strict=True))
    assert [label[path] for path in rest.files] == rest.labels.tolist()
    assert rest.labels.dtype == torch.int64


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_image_is_named(photos, content):
    path = photos / "red" / "0.png"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(TrainError, match=r"0\.png") as raised:
        read_image(path)
    assert "\n" not in str(raised.value)


def test_transform_resizes_the_shorter_side_and_crops_the_centre(photos):
    image = read_image(photos / "red" / "0.png")
    tensor = eval_transform(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(image)
    assert tensor.shape == (3, 32, 32)
    assert tensor.abs().max() <= 1
    assert tensor[0].mean() > tensor[1].mean() + 0.5


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({}, 0.0),
        ({"random_erasing": 0.9}, 0.6),
        ({"color_jitter": 0.4}, 0.99),
        ({"rand_augment": 9}, 0.6),
        ({"rand_augment": 9, "color_jitter": 0.4, "random_erasing": 0.9}, 0.99),
    ],
    ids=str,
)
def test_augmentation_changes_training_images(photos, options, changed):
    images = replace(folder.read(photos, photos), flips=((),))
    image = read_image(photos / "red" / "0.png").resize((48, 48))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def drawn(seed, **options):
        torch.manual_seed(seed)
        return train_transform(images, 32, mean, std, 48, **options)(image)

    different = []
    for seed in range(30):
        plain, found = drawn(seed), drawn(seed, **options)
        assert found.shape == (3, 32, 32)
        assert found.dtype == torch.float32
        assert found.equal(drawn(seed, **options))
        different.append(not found.equal(plain))
        if options.keys() == {"random_erasing"} and different[-1]:
            assert (found[found != plain] == 0).all()  # the mean colour
    assert sum(different) / 30 >= changed
    assert any(different) == bool(options)


def test_flips_come_after_all_plain_images(photos):
    images = folder.read(photos, photos)
    look = eval_transform(32, (0.0,) * 3, (1.0,) * 3)
    files = ImageFiles(images, "train", look, images.flips)
    count = len(images.splits["train"])
    assert len(files) == 2 * count
    plain, label = files[3]
    flipped, same_label = files[count + 3]
    assert label == same_label == int(files.labels[count + 3])
    assert flipped.equal(plain.flip(-1))
    assert not flipped.equal(plain)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_eight(tmp_path, mode, suffix):
    if (mode, suffix) == ("I;16B", "png"):
        pytest.skip("PNG has one order of bytes")
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    path = tmp_path / f"ramp.{suffix}"
    Image.frombytes(mode, (16, 16), ramp.astype(">u2" if mode == "I;16B" else "<u2").tobytes()).save(path)
    found = np.asarray(read_image(path))
    assert np.array_equal(found, np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(tmp_path, photos, mode):
    path = photos / "red" / "deep.tif"
    Image.new(mode, (8, 8), 1).save(path)
    with pytest.raises(TrainError, match="32 bits a pixel"):
        read_image(path)
    images = folder.read(photos, tmp_path)
    problems = [one.problem for one in scan(images, range(len(images.files))) if one.problem]
    assert len(problems) == 1
    assert "32 bits a pixel" in problems[0]


def test_digest_tells_other_splits_and_not_another_place(tmp_path, photos):
    before = folder.read(photos, tmp_path).digest()
    moved = photos.rename(tmp_path / "moved")
    assert folder.read(moved, tmp_path).digest() == before
    (moved / "red" / "3.png").unlink()
    assert folder.read(moved, tmp_path).digest() != before
