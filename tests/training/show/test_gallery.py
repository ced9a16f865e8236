"""The gallery shows right and wrong examples of many classes."""

import itertools
from dataclasses import replace

import torch
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from ggam_fast.training.config.options import HeadConfig
from ggam_fast.training.data.readers import folder
from ggam_fast.training.model.backbones import create_backbone
from ggam_fast.training.model.classifier import GGAMClassifier, create_head
from ggam_fast.training.show import gallery


def one_hot(predicted: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(predicted, classes).float()


def test_examples_are_right_and_wrong_from_many_classes():
    labels = torch.arange(8).repeat_interleave(5)
    predicted = labels.clone()
    predicted[::5] = (labels[::5] + 1) % 8  # the first image of each class is wrong
    rows = gallery.choose_examples(one_hot(predicted, 8), labels, 8)
    wrong = predicted[rows] != labels[rows]
    assert len(set(rows)) == 8
    assert wrong.sum() == 4
    assert labels[rows].unique().numel() == 8
    assert rows == gallery.choose_examples(one_hot(predicted, 8), labels, 8)


def test_examples_without_mistakes_or_without_successes():
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    right = gallery.choose_examples(one_hot(labels, 2), labels, 4)
    wrong = gallery.choose_examples(one_hot(1 - labels, 2), labels, 4)
    assert len(set(right)) == len(set(wrong)) == 4
    assert len(gallery.choose_examples(one_hot(labels, 2), labels, 99)) == 6


def test_long_names_stay_in_their_panels(tmp_path, photos, monkeypatch):
    images = replace(folder.read(photos, photos), classes=("W" * 90, "a rather long name " * 9, "犬" * 40))
    backbone = create_backbone("test_resnet", pretrained=False, image_size=64)
    model = GGAMClassifier(backbone, create_head(backbone, 3, HeadConfig(hidden_size=16)))
    drawn = []
    monkeypatch.setattr(gallery, "write_atomically", lambda path, write: drawn.append(write))
    logits = one_hot(torch.arange(len(images.splits["test"])) % 3, 3)
    gallery.draw_gallery(tmp_path / "gallery.png", model, images, "test", logits)
    [write] = drawn
    write(tmp_path / "gallery.png")
    [figure] = {cell.cell_contents for cell in write.__closure__ if isinstance(cell.cell_contents, Figure)}
    titled = [panel for panel in figure.findobj(SubFigure) if panel._suptitle is not None]
    assert len(titled) == 6
    for panel in titled:
        title = panel._suptitle.get_window_extent()
        assert panel.bbox.x0 <= title.x0 < title.x1 <= panel.bbox.x1
        captions = [axes.xaxis.label.get_window_extent() for axes in panel.axes]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(captions))


def test_picture_is_written_whole(tmp_path, photos):
    torch.manual_seed(0)
    images = folder.read(photos, photos)
    backbone = create_backbone("test_resnet", pretrained=False, image_size=64)
    model = GGAMClassifier(backbone, create_head(backbone, 3, HeadConfig(hidden_size=16)))
    logits = torch.randn(len(images.splits["test"]), 3)
    path = gallery.draw_gallery(tmp_path / "gallery.png", model, images, "test", logits)
    with Image.open(path) as picture:
        picture.load()
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 1000
    assert not model.training
