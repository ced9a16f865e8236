"""A marked pixel, its box, mask and part end up in the same place."""

import numpy as np
import pytest
import torch
from PIL import Image

from ggam_fast.training.data.annotations import Annotations
from ggam_fast.training.data.image_set import ImageSet, eval_transform
from ggam_fast.training.measure.geometry import Placed, boxes_to_masks, object_share, placed


@pytest.fixture
def marked(tmp_path):
    """A wide and a high picture, black except for a white block of 12 x 8 pixels."""
    blocks = ((40, 30), (20, 60))
    files, boxes, masks = [], [], []
    for number, (size, (x, y)) in enumerate(zip(((120, 90), (80, 130)), blocks, strict=True)):
        pixels = np.zeros((size[1], size[0], 3), dtype="uint8")
        pixels[y : y + 8, x : x + 12] = 255
        files.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
        boxes.append([x, y, x + 12, y + 8])
        masks.append(torch.from_numpy(pixels[..., 0] > 0))
    annotations = Annotations(
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(
            [[[x + 6.0, y + 4.0, 1.0], [1.0, 1.0, 1.0], [x + 6.0, y + 4.0, 0.0]] for x, y in blocks]
        ),
        ("p", "q", "r"),
        masks.__getitem__,
    )
    return ImageSet(
        "marked", tuple(files), torch.tensor([0, 1]), ("a", "b"),
        {"train": torch.tensor([0, 1]), "test": torch.tensor([0, 1])}, ((),), (), annotations,
    )  # fmt: skip


def centroid(area):
    return area.nonzero().double().mean(0)


@pytest.mark.parametrize(("size", "resize"), [(64, 64), (64, 80), (48, 64)])
def test_all_annotations_follow_the_image(marked, size, resize):
    transform = eval_transform(size, (0.0,) * 3, (1.0,) * 3, resize)
    found = placed(marked, [0, 1], transform, size)
    assert found.kinds() == ("areas", "boxes", "parts")
    for row in (0, 1):
        white = transform(marked.read(row))[0] > 0.5
        assert white.any()
        box = boxes_to_masks(found.boxes[row][None], (size, size))[0]
        for area in (found.areas[row], box):
            assert (centroid(area) - centroid(white)).abs().max() < 1
            assert area.sum() == pytest.approx(white.sum().item(), rel=0.4)
        x, y, visible = found.parts[row][0].tolist()
        assert visible == 1
        assert white[int(y), int(x)]
        assert found.parts[row][2, 2] == 0
    # The corner of a wide picture is cut off.
    assert found.parts[0][1, 2] == 0


def test_boxes_stand_in_for_masks(marked):
    from dataclasses import replace

    images = replace(marked, annotations=Annotations(boxes=marked.annotations.boxes))
    transform = eval_transform(64, (0.0,) * 3, (1.0,) * 3)
    found = placed(images, [1], transform, 64)
    assert found.areas.equal(boxes_to_masks(found.boxes, (64, 64)))
    assert placed(replace(marked, annotations=None), [0], transform, 64).kinds() == ()


def mask(x0, y0, x1, y1, size=(10, 10)):
    return boxes_to_masks(torch.tensor([[x0, y0, x1, y1]], dtype=torch.float32), size)


def test_box_pixels():
    found = mask(2, 3, 5, 4)
    assert found.sum() == 3
    assert found[0, 3, 2:5].all()


def test_the_share_of_the_objects_is_a_mean_over_pixels():
    areas = torch.zeros(2, 4, 4, dtype=torch.bool)
    areas[0, 0] = True
    truths = [Placed(areas, None, None), Placed(areas[:1], None, None)]
    assert object_share(truths) == pytest.approx((4 + 0 + 4) / 48)
    assert object_share([Placed(None, None, None)]) is None
